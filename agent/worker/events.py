"""What is worth telling about a camera: objects that came and went, crossings, changes of the camera's state. And the counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Mapping, Sequence, Set, Tuple

from agent.worker.tracker import Track, Update
from agent.worker.zones import Crossing

SETTLED_S = 0.5
BURST = 30
PER_S = 10.0


@dataclass(frozen=True)
class Event:
    """kinds: `new`, `end`, `crossed`, `camera`; `data` is plain JSON."""

    kind: str
    data: Mapping[str, Any]


class Announcer:
    """Turns tracks and crossings of one camera into events and counts.

    An object is `new` once it has been there for half a second, and has an `end` only if it was new: what flickers stays unsaid. `new`
    and `end` are limited to a burst of 30 and then 10 a second, the rest is dropped and counted; `crossed` is always told.
    """

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self._labels = frozenset(labels)
        self._told: Set[int] = set()
        self._allowance = float(BURST)
        self._at_s = 0.0
        self.dropped = 0
        self.present: Dict[str, int] = {}
        self.crossed: Dict[str, Dict[str, int]] = {"forward": {}, "backward": {}}

    def concerns(self, label: str) -> bool:
        return not self._labels or label in self._labels

    def update(self, update: Update, crossings: Sequence[Crossing], at_s: float) -> List[Event]:
        """Events of one frame taken at `at_s`."""
        self._allowance = min(float(BURST), self._allowance + max(0.0, at_s - self._at_s) * PER_S)
        self._at_s = max(at_s, self._at_s)
        events = self._crossings(crossings)
        here = [track for track in update.tracks if track.is_confirmed and self.concerns(track.label)]
        for track in here:
            if track.is_seen and track.track not in self._told and at_s - track.first_s >= SETTLED_S and self._may_tell():
                self._told.add(track.track)
                events.append(Event("new", _of_track(track)))
        for track in update.ended:
            if track.track in self._told:
                self._told.discard(track.track)
                if self._may_tell():
                    events.append(Event("end", dict(_of_track(track), seen_for_s=round(track.last_s - track.first_s, 2))))
        self.present = {}
        for track in here:
            self.present[track.label] = self.present.get(track.label, 0) + 1
        return events

    def counts(self) -> Dict[str, int]:
        """Crossings by label since the beginning, both directions together."""
        return {label: sum(each.get(label, 0) for each in self.crossed.values()) for each in self.crossed.values() for label in each}

    def _crossings(self, crossings: Sequence[Crossing]) -> List[Event]:
        events = []
        for crossing in crossings:
            if self.concerns(crossing.label):
                counts = self.crossed[crossing.direction]
                counts[crossing.label] = counts.get(crossing.label, 0) + 1
                events.append(Event("crossed", dict(asdict(crossing), at_s=round(crossing.at_s, 3), count=self.counts()[crossing.label])))
        return events

    def _may_tell(self) -> bool:
        if self._allowance < 1:
            self.dropped += 1
            return False
        self._allowance -= 1
        return True


def _of_track(track: Track) -> Dict[str, Any]:
    box: Tuple[float, ...] = (track.x0, track.y0, track.x1, track.y1)
    return {"track": track.track, "label": track.label, "score": round(track.score, 3), "box": [round(value, 1) for value in box]}
