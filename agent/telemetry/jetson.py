"""What a Jetson says about itself in sysfs: GPU load, power rails, throttling, the module's name. No NVML, no root rights.

Sources: NVIDIA Jetson Linux developer guide (power and thermal chapters); ina3221 hwmon documentation of the kernel.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from agent.telemetry.generic import Generic, Reading, read_number, read_text

GPU_NAMES = frozenset({"gp10b", "gv11b", "ga10b", "gb10b", "gpu"})
TOTAL_RAILS = ("VDD_IN", "POM_5V_IN")
_SUM_CHANNEL = 7  # the ina3221's own sum of its three inputs


class Jetson:
    """`read()` takes some milliseconds, for power rails are read over I2C."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._generic = Generic(root)

    def read(self) -> Reading:
        return replace(
            self._generic.read(), gpu_percent=gpu_percent(self._root), power_w=power_w(self._root), is_throttled=is_throttled(self._root)
        )


def is_jetson(root: Path) -> bool:
    return (root / "etc/nv_tegra_release").exists() or "tegra" in (read_text(root / "proc/device-tree/compatible") or "")


def module_name(root: Path) -> str | None:
    return read_text(root / "proc/device-tree/model")


def l4t_version(root: Path) -> str | None:
    """`# R35 (release), REVISION: 4.1, …` as `35.4.1`."""
    found = re.search(r"# R(\d+) .*?REVISION: ([\d.]+)", read_text(root / "etc/nv_tegra_release") or "")
    return f"{found[1]}.{found[2]}" if found else None


def gpu_percent(root: Path) -> float | None:
    """The devfreq node may appear only after boot services start, so it is looked up each time. Its load is in per mille."""
    for node in sorted((root / "sys/class/devfreq").glob("*")):
        if read_text(node / "device/of_node/name") in GPU_NAMES:
            load = read_number(node / "device/load")
            return None if load is None else round(load / 10, 1)
    return None


def rails_w(root: Path) -> dict[str, float]:
    """Watts by rail label, from every ina3221 on I2C; unused inputs are labelled NC."""
    found: dict[str, float] = {}
    for hwmon in sorted((root / "sys/bus/i2c/devices").glob("*/hwmon/hwmon*")):
        if "ina3221" not in (read_text(hwmon.parent.parent / "name") or ""):
            continue
        for label_file in sorted(hwmon.glob("in*_label")):
            channel = label_file.name.removeprefix("in").removesuffix("_label")
            label = read_text(label_file)
            millivolts, milliamperes = read_number(hwmon / f"in{channel}_input"), read_number(hwmon / f"curr{channel}_input")
            if not label or label == "NC" or channel == str(_SUM_CHANNEL) or millivolts is None or milliamperes is None:
                continue
            found[label] = millivolts * milliamperes / 1e6
    return found


def power_w(root: Path) -> float | None:
    """The module's input where it is measured, else the sum of its rails."""
    rails = rails_w(root)
    total = next((rails[name] for name in TOTAL_RAILS if name in rails), sum(rails.values()) if rails else None)
    return None if total is None else round(total, 2)


def is_throttled(root: Path) -> bool | None:
    """Whether a throttling cooling device is in action. The fan cools too, but slows nothing down."""
    states = [
        read_number(device / "cur_state")
        for device in (root / "sys/devices/virtual/thermal").glob("cooling_device*")
        if re.search(r"throttle|cpufreq|devfreq|alert", (read_text(device / "type") or "").lower())
    ]
    known = [state for state in states if state is not None]
    return any(state > 0 for state in known) if known else None


def power_mode(text: str) -> tuple[str, int] | None:
    """Name and id from what `nvpmodel -q` prints: `NV Power Mode: NAME`, the id on the next line."""
    found = re.search(r"NV Power Mode:\s*(\S+)\s*\n\s*(\d+)", text)
    return (found[1], int(found[2])) if found else None
