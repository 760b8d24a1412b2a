"""The worker's report of a camera as others read it, and whether it says anything new. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.cameras.health import words
from agent.protocol.messages import CameraState, LineCounts
from agent.protocol.wire import wire_now

NEWS = ("state", "objects", "zones", "lines", "is_slowed")  # rates and ages change with every look


def has_news(before: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
    return any(before.get(name) != report.get(name) for name in NEWS)


def camera_state(node: str, report: Mapping[str, Any]) -> CameraState:
    """Raises ValueError (pydantic's) for a report that no message may hold."""
    camera = str(report["id"])
    lines = report.get("lines") or {}
    return CameraState(
        node=node,
        id=camera,
        ts=wire_now(),
        state=str(report.get("state", "starting")),
        words=words(camera, report)[:2000],
        fps=float(report.get("fps") or 0.0),
        age_ms=report.get("age_ms_p50"),
        is_slowed=bool(report.get("is_slowed")),
        objects=dict(report.get("objects") or {}),
        zones={name: dict(labels) for name, labels in (report.get("zones") or {}).items()},
        lines={name: LineCounts(forward=_sum(ways.get("forward")), backward=_sum(ways.get("backward"))) for name, ways in lines.items()},
    )


def _sum(labels: Mapping[str, int] | None) -> int:
    return sum((labels or {}).values())
