"""Prometheus figures of cameras, read from the worker's last report at the moment of a scrape. Their names are those of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from agent.http.collaborators import Sightings, VisionService

# family, words, field of the report
GAUGES = (
    ("hotspare_camera_fps_in", "Frames that arrive each second.", "camera_fps"),
    ("hotspare_camera_fps", "Frames looked at each second.", "fps"),
    ("hotspare_camera_fps_wanted", "Frames to look at each second, as of now.", "fps_wanted"),
    ("hotspare_camera_inference_ms", "Milliseconds of inference for a frame, median.", "latency_ms"),
    ("hotspare_camera_decode_ms", "Milliseconds from packet to masked picture, median; without what a driver does.", "decode_ms"),
    ("hotspare_camera_slowed", "1 while requests for text have the device.", "is_slowed"),
    ("hotspare_camera_failures_in_a_row", "Attempts to connect that failed since the last frame.", "failures"),
)
COUNTERS = (
    ("hotspare_camera_processed", "Frames looked at.", "processed"),
    ("hotspare_camera_connections", "Connections that gave a frame.", "connections"),
    ("hotspare_camera_stalls", "Times that a camera that streamed went silent.", "stalls"),
)
AGES = (("0.5", "age_ms_p50"), ("0.95", "age_ms_p95"))


class CameraCollector:
    """A report comes once a second; a camera that does not say a figure has no sample of it."""

    def __init__(self, vision: VisionService, sightings: Sightings | None) -> None:
        self._vision = vision
        self._sightings = sightings

    def describe(self) -> Iterable[Metric]:
        """Empty: registering must not ask a node that is still starting."""
        return ()

    def collect(self) -> Iterable[Metric]:
        reports = [(str(report["id"]), report) for report in self._vision.cameras()]
        streaming = GaugeMetricFamily("hotspare_camera_streaming", "1 while frames come in.", labels=["camera"])
        for camera, report in reports:
            streaming.add_metric([camera], report.get("state") == "streaming")
        yield streaming
        for name, text, field in GAUGES:
            yield _filled(GaugeMetricFamily(name, text, labels=["camera"]), reports, field)
        for name, text, field in COUNTERS:
            yield _filled(CounterMetricFamily(name, text, labels=["camera"]), reports, field)
        ages = GaugeMetricFamily(
            "hotspare_camera_frame_age_ms", "Milliseconds from capture to result, of the last frames.", labels=["camera", "quantile"]
        )
        dropped = CounterMetricFamily("hotspare_camera_dropped", "Frames not looked at, by cause.", labels=["camera", "cause"])
        for camera, report in reports:
            for quantile, field in AGES:
                _add(ages, [camera, quantile], report.get(field))
            for cause, count in (report.get("skipped") or {}).items():
                _add(dropped, [camera, str(cause)], count)
        yield ages
        yield dropped
        if self._sightings is not None:
            yield from _events(self._sightings)


def _events(sightings: Sightings) -> Iterable[Metric]:
    kept = CounterMetricFamily("hotspare_camera_events", "Events that have ended and are kept.", labels=["camera", "label"])
    for (camera, label), count in dict(sightings.kept).items():
        kept.add_metric([camera, label], count)
    yield kept
    yield CounterMetricFamily("hotspare_camera_events_dropped", "Events that could not be kept.", sightings.dropped)


def _filled(family: Any, reports: Sequence[tuple[str, Mapping[str, Any]]], field: str) -> Metric:
    for camera, report in reports:
        _add(family, [camera], report.get(field))
    metric: Metric = family
    return metric


def _add(family: Any, labels: list[str], value: Any) -> None:
    if isinstance(value, int | float):
        family.add_metric(labels, float(value))
