"""Counting objects that cross lines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Dict, List, Literal, Sequence, Set, Tuple

from agent.worker.polygons import Point

if TYPE_CHECKING:
    from agent.worker.tracker import Track

Direction = Literal["forward", "backward"]

NOTHING: Tuple[Direction, float] = ("forward", math.nan)


@dataclass(frozen=True)
class Line:
    """From `start` to `end`, both (x, y) in shares of the picture. `forward` crosses a line drawn downwards from left to right.

    anchor  the point of an object that crosses: `centre` of its box, or `foot`, the middle of the lower edge, for things that stand
    margin  how far beyond the line, as a share of the picture's height, an object must come to count: what trembles on it does not
    counts  `once`: an object's first crossing; `every`: each one, for places where people come and go
    """

    start: Point = (0.5, 0.0)
    end: Point = (0.5, 1.0)
    anchor: Literal["centre", "foot"] = "centre"
    margin: float = 0.01
    name: str = "line"
    counts: Literal["once", "every"] = "once"


@dataclass(frozen=True)
class Crossing:
    """`at_s`: when the anchor met the line, between two frames; by the clock of the frames."""

    track: int
    label: str
    direction: Direction
    at_s: float
    line: str = "line"


@dataclass
class _Seen:
    side: float
    point: Point
    at_s: float
    pending: Tuple[Direction, float] = NOTHING
    is_counted: bool = False


class LineCounter:
    """Counts each track on the first crossing that it completes, or on all; a track counts as soon as it is confirmed."""

    def __init__(self, line: Line, width: int, height: int) -> None:
        self.line = line
        self._start = (line.start[0] * width, line.start[1] * height)
        self._along = (line.end[0] * width - self._start[0], line.end[1] * height - self._start[1])
        self._length = math.hypot(*self._along)
        if self._length == 0:
            raise ValueError(f"the line from {line.start} to {line.end} has no length; give two different points")
        self._margin = line.margin * height
        self._seen: Dict[int, _Seen] = {}

    def update(self, tracks: Sequence[Track], at_s: float) -> List[Crossing]:
        """Crossings completed with this frame. Tracks that are not given any more are forgotten."""
        crossings = []
        for track in tracks:
            if not track.is_seen:  # a prediction is no evidence
                continue
            seen = self._follow(track, at_s)
            if track.is_confirmed and not math.isnan(seen.pending[1]):
                if not seen.is_counted or self.line.counts == "every":
                    crossings.append(Crossing(track.track, track.label, *seen.pending, self.line.name))
                seen.is_counted, seen.pending = True, NOTHING
        alive: Set[int] = {track.track for track in tracks}
        self._seen = {number: seen for number, seen in self._seen.items() if number in alive}
        return crossings

    def _follow(self, track: Track, at_s: float) -> _Seen:
        point = ((track.x0 + track.x1) / 2, track.y1 if self.line.anchor == "foot" else (track.y0 + track.y1) / 2)
        off = self._distance(point)
        seen = self._seen.get(track.track)
        if seen is None:
            seen = self._seen[track.track] = _Seen(off or 1.0, point, at_s)
        elif off * seen.side < 0 and abs(off) >= self._margin:
            share = abs(self._distance(seen.point)) / (abs(self._distance(seen.point)) + abs(off))
            met = (seen.point[0] + (point[0] - seen.point[0]) * share, seen.point[1] + (point[1] - seen.point[1]) * share)
            if 0 <= self._position(met) <= 1:
                seen.pending = ("forward" if off < 0 else "backward", seen.at_s + (at_s - seen.at_s) * share)
            seen.side, seen.point, seen.at_s = off, point, at_s
        elif off * seen.side > 0:
            seen.point, seen.at_s = point, at_s
        return seen

    def _distance(self, point: Point) -> float:
        """Pixels from the endless line; positive on the left of a line that is drawn downwards."""
        x, y = point[0] - self._start[0], point[1] - self._start[1]
        return (self._along[0] * y - self._along[1] * x) / self._length

    def _position(self, point: Point) -> float:
        """Where along the line, 0 at its start and 1 at its end."""
        x, y = point[0] - self._start[0], point[1] - self._start[1]
        return (self._along[0] * x + self._along[1] * y) / self._length**2
