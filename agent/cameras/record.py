"""What is kept of one object that a camera saw: from its first sighting to its end."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

EVENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
NAMES_MAX = 32
DAY_S = 86_400.0

# `object`: it left. The others mark an end that nobody saw: the process that watched it died, or the node was started anew.
EndedBy = Literal["object", "worker_lost", "node_restarted"]


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Times ending in `_at` are seconds since 1970 by this node's clock, for people; boxes are [x0, y0, x1, y1] in pixels of a picture
    of the size `picture`.

    number    only grows on one node; pages are cut by it. 0: not kept yet
    is_clock_sure  whether the clock was set when it began, so that its age can be believed
    zones     those it was in at any time, `loitering` those in which it stayed too long
    crossed   (line, direction) in the order of crossing
    clip      whether a clip was announced; it may still be being written
    """

    id: str
    camera: str
    label: str
    began_at: float
    score: float = 0.0
    box: tuple[float, ...] = ()
    snapshot_box: tuple[float, ...] = ()
    picture: tuple[int, int] = (0, 0)
    zones: tuple[str, ...] = ()
    dwell_s: Mapping[str, float] | None = None
    loitering: tuple[str, ...] = ()
    crossed: tuple[tuple[str, str], ...] = ()
    ended_at: float | None = None
    ended_by: EndedBy | None = None
    seen_for_s: float = 0.0
    has_snapshot: bool = False
    has_clip: bool = False
    is_clock_sure: bool = True
    number: int = 0


class NotAnEvent(ValueError):
    """What the worker sent cannot be kept; the message says why."""


def record_of(camera: str, data: Mapping[str, Any], at: float, is_clock_sure: bool) -> EventRecord:
    """The record of an `object` event as agent/worker/events.py describes it. Raises NotAnEvent.

    The worker is ours, but it feeds on pictures that are not: what becomes a file name or a page of JSON is checked and bounded.
    """
    identifier, label = data.get("id"), data.get("label")
    if not isinstance(identifier, str) or not EVENT_ID.match(identifier):
        raise NotAnEvent(f"an event of camera {camera} has the id {str(identifier)[:100]!r}, which cannot name a file")
    if not isinstance(label, str):
        raise NotAnEvent(f"event {identifier} of camera {camera} has no label")
    has_ended = data.get("type") == "end"
    began_at = _time(data.get("started_s"), at)
    ended_at = _time(data.get("ended_s"), at) if has_ended else None
    dwell = data.get("dwell_s")
    return EventRecord(
        id=identifier,
        camera=camera,
        label=_text(label),
        began_at=began_at,
        score=round(_number(data.get("top_score", data.get("score"))), 4),
        box=_box(data.get("box")),
        snapshot_box=_box(data.get("snapshot_box")),
        picture=(int(_number(data.get("width"))), int(_number(data.get("height")))),
        zones=_names(data.get("entered_zones")),
        dwell_s={_text(zone): round(_number(value), 2) for zone, value in list(dwell.items())[:NAMES_MAX]}
        if isinstance(dwell, Mapping)
        else {},
        loitering=_names(data.get("is_loitering")),
        crossed=tuple(
            (_text(each.get("line", "")), _text(each.get("direction", "")))
            for each in _items(data.get("crossed"))[:NAMES_MAX]
            if isinstance(each, Mapping)
        ),
        ended_at=ended_at,
        ended_by="object" if has_ended else None,
        seen_for_s=0.0 if ended_at is None else round(max(0.0, ended_at - began_at), 2),
        has_clip=data.get("clip") == f"{identifier}.mp4",
        is_clock_sure=is_clock_sure,
    )


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _box(value: Any) -> tuple[float, ...]:
    return tuple(round(_number(each), 1) for each in _items(value)[:4])


def _time(value: Any, now: float) -> float:
    """What the worker says, unless its clock and ours cannot mean the same."""
    told = _number(value)
    return round(told, 3) if abs(told - now) < DAY_S else round(now, 3)


def _names(value: Any) -> tuple[str, ...]:
    return tuple(_text(name) for name in _items(value)[:NAMES_MAX])


def _text(value: Any) -> str:
    """Bounded, and without what JSON may spell but no encoding can hold."""
    return str(value)[:64].encode(errors="replace").decode()


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
