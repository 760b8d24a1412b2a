from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from models.device import Device, probe_device, read_l4t


class Driver:
    """libcuda of an Orin, as ctypes sees it; `failing` maps a call to the error it answers."""

    def __init__(self, failing: dict[str, int] | None = None, devices: int = 1) -> None:
        self.failing = failing or {}
        self.devices = devices

    def answer(self, call: str, target: Any = None, value: int = 0) -> int:
        if call in self.failing:
            return self.failing[call]
        if target is not None:
            target._obj.value = value
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.answer("cuInit")

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        return self.answer("cuDeviceGetCount", count, self.devices)

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        return self.answer("cuDeviceGet", device, ordinal)

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = b"Orin"
        return self.answer("cuDeviceGetName")

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:  # noqa: N802
        return self.answer("cuDeviceTotalMem", size, 7_990 << 20)

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        return self.answer("cuDriverGetVersion", version, 12060)

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        return self.answer("cuDeviceGetAttribute", value, {18: 1, 75: 8, 76: 7}[attribute])


def jetson(root: Path, text: str) -> Path:
    (root / "etc").mkdir()
    (root / "etc/nv_tegra_release").write_text(text)
    return root


def test_an_orin_is_known_by_name_and_release(tmp_path: Path) -> None:
    root = jetson(
        tmp_path, "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"
    )
    device = probe_device(root, {"libcuda.so.1": Driver()}.__getitem__)
    assert device == Device("cuda", "Orin", "87", 7_990 << 20, is_integrated=True, l4t="36.4.3", driver="12.6")
    assert device.key == "Orin/sm_87"


def test_without_a_driver_this_is_a_cpu(tmp_path: Path) -> None:
    device = probe_device(tmp_path, lambda name: ctypes.CDLL(str(tmp_path / name)))
    assert (device.kind, device.key, device.sm) == ("cpu", "cpu", "")
    assert "libcuda.so.1: cannot open shared object file" in device.reason


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Driver({"cuInit": 100}), "cuInit with error 100"),
        (Driver({"cuInit": 34}), "cuInit with error 34"),
        (Driver({"cuDeviceGetAttribute": 1}), "cuDeviceGetAttribute 75 with error 1"),
        (Driver(devices=0), "knows no device"),
    ],
)
def test_a_driver_that_fails_is_no_device(tmp_path: Path, driver: Driver, reason: str) -> None:
    device = probe_device(tmp_path, lambda name: driver)
    assert device.kind == "cpu"
    assert reason in device.reason


def test_the_release_of_older_boards_and_of_no_board(tmp_path: Path) -> None:
    assert read_l4t(tmp_path) == ""
    root = jetson(
        tmp_path, "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, DATE: Tue Aug  1 19:57:35 UTC 2023"
    )
    assert read_l4t(root) == "35.4.1"
    (root / "etc/nv_tegra_release").write_text("something else")
    assert read_l4t(root) == ""
