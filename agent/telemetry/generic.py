"""What any Linux says about itself: load, memory, temperatures, clocks. All from files under a given root."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass, field
from pathlib import Path

from agent.protocol.messages import HeartbeatBody, HttpLoad

_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_TIMEX_BYTES = 512  # more than any struct timex


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the device; None where nothing measures it. Loads in percent, power in watts."""

    cpu_percent: float | None = None
    gpu_percent: float | None = None
    memory_used_mb: int | None = None
    memory_total_mb: int | None = None
    temperatures_c: dict[str, float] = field(default_factory=dict)
    power_w: float | None = None
    is_throttled: bool | None = None

    def heartbeat(self, http: HttpLoad) -> HeartbeatBody:
        return HeartbeatBody(
            cpu=self.cpu_percent,
            gpu=self.gpu_percent,
            mem_mb=self.memory_used_mb,
            temp_c=dict(list(self.temperatures_c.items())[:32]),
            power_w=self.power_w,
            throttled=self.is_throttled,
            http=http,
        )


class Generic:
    """`read()` takes about a millisecond; the CPU load is that since the call before."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._busy, self._total = 0, 0

    def read(self) -> Reading:
        used_mb, total_mb = memory_mb(self._root)
        return Reading(self._cpu_percent(), None, used_mb, total_mb, temperatures_c(self._root))

    def _cpu_percent(self) -> float | None:
        # proc(5): user nice system idle iowait irq softirq steal; guest times are inside user.
        fields = [int(part) for part in (read_text(self._root / "proc/stat") or "").partition("\n")[0].split()[1:9] if part.isdigit()]
        if len(fields) < 5:
            return None
        total, busy = sum(fields), sum(fields) - fields[3] - fields[4]
        spent, worked = total - self._total, busy - self._busy
        is_first, self._total, self._busy = self._total == 0, total, busy
        return None if is_first or spent <= 0 else round(min(100.0, max(0.0, 100.0 * worked / spent)), 1)


def read_text(file: Path) -> str | None:
    """None where the file is absent or its device is asleep: sysfs raises OSError for a sensor that is powered off."""
    try:
        return file.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None


def read_number(file: Path) -> float | None:
    text = read_text(file)
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def memory_mb(root: Path) -> tuple[int | None, int | None]:
    """Used and total; used is what is not available, which on a Jetson includes the GPU's."""
    values = {}
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        number = rest.split()[:1]
        if number and number[0].isdigit():
            values[name] = int(number[0])
    total, available = values.get("MemTotal"), values.get("MemAvailable")
    if total is None or available is None:
        return None, None
    return (total - available) // 1024, total // 1024


def temperatures_c(root: Path) -> dict[str, float]:
    """By zone name, lower case, without the suffixes -thermal and _thermal. Zones that are off are left out."""
    found: dict[str, float] = {}
    for zone in sorted((root / "sys/devices/virtual/thermal").glob("thermal_zone*")):
        name, value = read_text(zone / "type"), read_number(zone / "temp")
        if name and value is not None and -40_000 < value < 200_000:
            found[name.lower().removesuffix("-thermal").removesuffix("_thermal")[:128]] = round(value / 1000, 1)
    return found


def kernel_boot_id(root: Path = Path("/")) -> str:
    """One id per boot of the kernel (random(4)); without it each start of the daemon counts as a boot."""
    return read_text(root / "proc/sys/kernel/random/boot_id") or f"start-{time.time_ns()}"


def boot_clock_s() -> float:
    """Seconds since boot, suspend included; comparable between processes of one boot."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def clock_is_synced(root: Path = Path("/")) -> bool:
    """True once NTP has set the wall clock: by systemd-timesyncd's mark, else by the kernel (a sandbox may hide that one)."""
    if (root / "run/systemd/timesync/synchronized").exists():
        return True
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return False
    return 0 <= int(state) < _TIME_ERROR
