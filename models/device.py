"""What this machine computes on, asked of the CUDA driver itself: TensorRT must not be asked, for without a driver it may crash.

Driver API: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__DEVICE.html
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

LIBRARY = "libcuda.so.1"
RELEASE = Path("etc/nv_tegra_release")
RELEASE_PATTERN = re.compile(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)")

# CUdevice_attribute
INTEGRATED = 18
COMPUTE_CAPABILITY_MAJOR = 75
COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class Device:
    """The first CUDA device that this process may use, or the CPU.

    kind           `cpu` or `cuda`
    sm             compute capability in one word, e.g. `87`; empty on the CPU
    memory_bytes   of the device; on an integrated GPU it is the memory of the CPU as well; 0 on the CPU
    l4t            NVIDIA's Linux release on a Jetson, e.g. `36.4.3`; empty elsewhere
    driver         CUDA version of the driver, e.g. `12.6`
    reason         why there is no CUDA device; empty where there is one
    """

    kind: str
    name: str
    sm: str = ""
    memory_bytes: int = 0
    is_integrated: bool = False
    l4t: str = ""
    driver: str = ""
    reason: str = ""

    @property
    def key(self) -> str:
        """The word for this device in an EngineKey: a plan made for one does not run on another."""
        return f"{self.name}/sm_{self.sm}" if self.kind == "cuda" else "cpu"


class _NoDevice(Exception):
    pass


def probe_device(root: Path = Path("/"), load: Callable[[str], Any] = ctypes.CDLL) -> Device:
    """Ask the driver; never raises. `root` holds etc/nv_tegra_release, `load` opens the driver's library."""
    l4t = read_l4t(root)
    try:
        return _ask(_driver(load), l4t)
    except _NoDevice as error:
        return Device("cpu", "cpu", l4t=l4t, reason=str(error))


def read_l4t(root: Path = Path("/")) -> str:
    """`36.4.3` from `# R36 (release), REVISION: 4.3, …`; empty where this is no Jetson."""
    try:
        found = RELEASE_PATTERN.search((root / RELEASE).read_text(encoding="utf-8", errors="replace")[:4096])
    except OSError:
        return ""
    return f"{found.group(1)}.{found.group(2)}" if found else ""


def _driver(load: Callable[[str], Any]) -> Any:
    try:
        driver = load(LIBRARY)
    except OSError as error:
        raise _NoDevice(f"no CUDA driver: {error}") from error
    _check(driver.cuInit(0), "cuInit")
    return driver


def _ask(driver: Any, l4t: str) -> Device:
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    _check(driver.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    if count.value < 1:
        raise _NoDevice("the CUDA driver knows no device")
    _check(driver.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _check(driver.cuDeviceGetName(name, len(name), device), "cuDeviceGetName")
    _check(driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device), "cuDeviceTotalMem")
    _check(driver.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
    major, minor = (_attribute(driver, device, each) for each in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR))
    return Device(
        kind="cuda",
        name=name.value.decode(errors="replace"),
        sm=f"{major}{minor}",
        memory_bytes=memory.value,
        is_integrated=bool(_attribute(driver, device, INTEGRATED)),
        l4t=l4t,
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def _attribute(driver: Any, device: ctypes.c_int, attribute: int) -> int:
    value = ctypes.c_int()
    _check(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device), f"cuDeviceGetAttribute {attribute}")
    return value.value


def _check(code: Optional[int], call: str) -> None:
    if code:
        raise _NoDevice(f"the CUDA driver answered {call} with error {code}")
