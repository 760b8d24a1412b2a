"""Who is in which zone, since when, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Sequence, Set, Tuple

import numpy as np

from agent.worker.areas import Zone
from agent.worker.polygons import inside
from agent.worker.tracker import Track

# A foot on the very edge of the picture, as of everything that is cut off below, is within a zone that reaches to the edge.
EDGE = 1e-4
SETTLED_S = 0.5


@dataclass(frozen=True)
class Stay:
    """One object and the zones: where it is, where it has been, in the order of entering; seconds in each; where it loiters."""

    zones: Tuple[str, ...] = ()
    entered: Tuple[str, ...] = ()
    dwell_s: Mapping[str, float] = field(default_factory=dict)
    loitering: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Occupancy:
    """`count` objects of `label` are in `zone` now."""

    zone: str
    label: str
    count: int


@dataclass
class _Visit:
    """streak_s: since when, and `streak` for how many frames in a row, it has been seen on the other side."""

    is_in: bool = False
    streak: int = 0
    streak_s: float = 0.0
    in_since_s: float = 0.0
    before_s: float = 0.0

    def dwell_s(self, at_s: float) -> float:
        return self.before_s + (at_s - self.in_since_s if self.is_in else 0.0)

    def see(self, is_inside: bool, at_s: float, inertia: int) -> None:
        if is_inside == self.is_in:
            self.streak = 0
            return
        if self.streak == 0:
            self.streak_s = at_s
        self.streak += 1
        if self.streak < inertia:
            return
        if self.is_in:
            self.before_s += self.streak_s - self.in_since_s
        else:
            self.in_since_s = self.streak_s
        self.is_in, self.streak = is_inside, 0


@dataclass
class _Told:
    count: int = 0
    at_s: float = float("-inf")


class ZoneWatch:
    """Follows the tracks of one camera through its zones; `change` keeps what is known of zones that stay as they are."""

    def __init__(self, zones: Sequence[Zone]) -> None:
        self._zones: Tuple[Zone, ...] = ()
        self._polygons: List[np.ndarray] = []
        self._visits: Dict[str, Dict[int, _Visit]] = {}
        self._orders: Dict[int, List[str]] = {}
        self._counts: Dict[Tuple[str, str], int] = {}
        self._told: Dict[Tuple[str, str], _Told] = {}
        self.change(zones)

    def change(self, zones: Sequence[Zone]) -> None:
        shapes = {zone.name: zone.points for zone in self._zones}
        kept = {zone.name for zone in zones if shapes.get(zone.name) == zone.points}
        self._zones = tuple(zones)
        self._polygons = [np.array(zone.points, np.float64) for zone in zones]
        self._visits = {zone.name: self._visits[zone.name] if zone.name in kept else {} for zone in zones}
        self._orders = {track: [name for name in order if name in kept] for track, order in self._orders.items()}

    def update(self, tracks: Sequence[Track], width: int, height: int, at_s: float) -> Dict[int, Stay]:
        """Where the tracks are, by number. A track that is not given any more has left everything and is forgotten."""
        if not self._zones:
            self._counts = {}
            return {}
        seen = [track for track in tracks if track.is_seen and track.is_confirmed]
        feet = np.array([((track.x0 + track.x1) / 2 / width, track.y1 / height) for track in seen], np.float64).reshape(-1, 2)
        feet = np.clip(feet, EDGE, 1 - EDGE)
        for zone, polygon in zip(self._zones, self._polygons):
            visits = self._visits[zone.name]
            for track, is_inside in zip(seen, inside(polygon, feet)):
                if zone.labels and track.label not in zone.labels:
                    is_inside = False
                elif is_inside and track.track not in visits:
                    visits[track.track] = _Visit()
                if track.track in visits:
                    self._see(zone, visits[track.track], track.track, bool(is_inside), at_s)
        self._forget({track.track for track in tracks})
        self._counts = self._counted(tracks)
        return {track.track: self._stay(track, at_s) for track in tracks if track.track in self._orders}

    def changes(self, at_s: float, are_final: bool = False) -> List[Occupancy]:
        """Counts that differ from what was told last, each no sooner than half a second after that, unless there will be no later."""
        news = []
        for key in sorted(set(self._counts) | set(self._told)):
            count, told = self._counts.get(key, 0), self._told.setdefault(key, _Told())
            if count != told.count and (are_final or at_s - told.at_s >= SETTLED_S):
                told.count, told.at_s = count, at_s
                news.append(Occupancy(*key, count))
            elif not count and not told.count:
                del self._told[key]
        return news

    def occupancy(self) -> Dict[str, Dict[str, int]]:
        """{zone: {label: how many are in it}}; every zone is there."""
        report: Dict[str, Dict[str, int]] = {zone.name: {} for zone in self._zones}
        for (zone, label), count in self._counts.items():
            report[zone][label] = count
        return report

    def _see(self, zone: Zone, visit: _Visit, track: int, is_inside: bool, at_s: float) -> None:
        visit.see(is_inside, at_s, zone.inertia_frames)
        if visit.is_in:
            order = self._orders.setdefault(track, [])
            if zone.name not in order:
                order.append(zone.name)

    def _forget(self, alive: Set[int]) -> None:
        for name, visits in self._visits.items():
            self._visits[name] = {track: visit for track, visit in visits.items() if track in alive}
        self._orders = {track: order for track, order in self._orders.items() if track in alive}

    def _counted(self, tracks: Sequence[Track]) -> Dict[Tuple[str, str], int]:
        counts: Dict[Tuple[str, str], int] = {}
        for zone in self._zones:
            visits = self._visits[zone.name]
            for track in tracks:
                visit = visits.get(track.track)
                if visit is not None and visit.is_in:
                    key = (zone.name, track.label)
                    counts[key] = counts.get(key, 0) + 1
        return counts

    def _stay(self, track: Track, at_s: float) -> Stay:
        order = self._orders[track.track]
        visits = {name: self._visits[name][track.track] for name in order}
        dwell_s = {name: visit.dwell_s(at_s) for name, visit in visits.items()}
        limits = {zone.name: zone.loitering_of(track.label) for zone in self._zones}
        here = tuple(name for name in order if visits[name].is_in)
        return Stay(here, tuple(order), dwell_s, tuple(name for name in here if dwell_s[name] >= limits[name]))
