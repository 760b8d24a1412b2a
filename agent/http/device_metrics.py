"""Prometheus figures of the device itself: load, memory, heat, power. What nothing measures has no sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric

from agent.http.collaborators import NodeSnapshot
from agent.telemetry.generic import Reading

MB = 1 << 20

GAUGES: Mapping[str, tuple[str, Callable[[Reading], float | None]]] = {
    "hotspare_device_cpu_ratio": ("Busy share of all CPU cores, 0 to 1.", lambda now: _scaled(now.cpu_percent, 0.01)),
    "hotspare_device_gpu_ratio": ("Busy share of the GPU, 0 to 1.", lambda now: _scaled(now.gpu_percent, 0.01)),
    "hotspare_device_memory_used_bytes": ("Memory that is not available, the GPU's included.", lambda now: _scaled(now.memory_used_mb, MB)),
    "hotspare_device_memory_bytes": ("Memory in all.", lambda now: _scaled(now.memory_total_mb, MB)),
    "hotspare_device_power_watts": ("What the module draws.", lambda now: now.power_w),
    "hotspare_device_throttled": ("1 while the device is slowed down for heat or power.", lambda now: _scaled(now.is_throttled, 1)),
}


class DeviceCollector:
    def __init__(self, snapshot: Callable[[], NodeSnapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        """Empty: registering must not ask a node that is still starting."""
        return ()

    def collect(self) -> Iterable[Metric]:
        now = self._snapshot().device
        for name, (words, value) in GAUGES.items():
            figure = value(now)
            if figure is not None:
                yield GaugeMetricFamily(name, words, figure)
        heat = GaugeMetricFamily("hotspare_device_temperature_celsius", "Temperature of a thermal zone.", labels=["zone"])
        for zone, celsius in now.temperatures_c.items():
            heat.add_metric([zone], celsius)
        yield heat


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
