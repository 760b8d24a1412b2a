"""Areas of a camera's picture: what nobody may see, and where it matters who stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Mapping, Tuple

from agent.worker.polygons import Point, check_name, check_polygon

MAX_INERTIA = 100
DAY_S = 86400.0


@dataclass(frozen=True)
class Mask:
    """An area that nobody may see: black before anything looks at, keeps or sends the picture."""

    name: str
    points: Tuple[Point, ...]


@dataclass(frozen=True)
class Zone:
    """An area in which an object stands when the middle of its lower edge does.

    labels          whom it concerns; empty: everybody
    inertia_frames  for how many frames in a row an object must be in, or out, to have entered or left
    loitering_s     seconds after which somebody who stays is loitering: one number for all, or by label; None: never
    """

    name: str
    points: Tuple[Point, ...]
    labels: Tuple[str, ...] = ()
    inertia_frames: int = 3
    loitering_s: Any = None

    def loitering_of(self, label: str) -> float:
        """After how many seconds something of this label loiters; infinite: never."""
        limit = self.loitering_s.get(label) if isinstance(self.loitering_s, Mapping) else self.loitering_s
        return math.inf if limit is None else float(limit)


def check_zone(zone: Zone, where: str) -> None:
    check_name(zone.name, f"{where}.name")
    check_polygon(zone.points, f"{where}.points")
    if not 1 <= zone.inertia_frames <= MAX_INERTIA:
        raise ValueError(f"{where}.inertia_frames: {zone.inertia_frames} is not in 1..{MAX_INERTIA}")
    limits = zone.loitering_s if isinstance(zone.loitering_s, Mapping) else {"": zone.loitering_s}
    for label, limit in limits.items():
        field = f"{where}.loitering_s" + (f".{label}" if label else "")
        if limit is None and not label:
            continue
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit <= DAY_S:
            raise ValueError(f"{field}: {limit!r} is not a number of seconds in 0..{DAY_S:.0f}")
