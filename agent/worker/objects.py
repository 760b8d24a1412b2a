"""The lives of objects, as they are told: new, update, end. See `object` in agent/worker/events.py."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Protocol, Sequence, Set, Tuple

from agent.worker.events import Allowance, Event
from agent.worker.lines import Crossing
from agent.worker.tracker import Track, Update
from agent.worker.zones import Stay

SETTLED_S = 0.5
UPDATE_S = 1.0
MAX_OPEN = 256
BETTER = 1.2
# A picture is encoded no more often than this for the sake of a better snapshot.
PICTURE_S = 0.25
AT_THE_EDGE = 0.5

NOWHERE = Stay()


class Clips(Protocol):
    """Whoever records: `begin` says whether a clip is made of an event; `ago_s`: before the newest frame."""

    def begin(self, event_id: str, label: str, ago_s: float) -> bool: ...
    def end(self, event_id: str, ago_s: float) -> None: ...


@dataclass(frozen=True)
class Scene:
    """One frame, understood. `at_s` by the clock of the frames, `unix_s` the same moment in Unix seconds; `jpeg` encodes the picture."""

    update: Update
    crossings: Sequence[Crossing]
    stays: Mapping[int, Stay]
    at_s: float
    unix_s: float
    width: int
    height: int
    jpeg: Callable[[], bytes]


@dataclass
class _Life:
    id: str
    track: Track
    started_s: float
    clip: Optional[str] = None
    stay: Stay = NOWHERE
    top_score: float = 0.0
    crossed: List[Dict[str, str]] = field(default_factory=list)
    told_s: float = 0.0
    told: Tuple[Any, ...] = ()
    quality: float = 0.0
    snapshot: bytes = b""
    snapshot_box: Optional[List[float]] = None

    def state(self) -> Tuple[Any, ...]:
        """What must differ for an update to be worth telling."""
        return self.track.label, self.stay.zones, self.stay.entered, self.stay.loitering, len(self.crossed), self.quality


class Objects:
    """Turns what is seen by one camera into events. What flickers stays unsaid; in a flood new ones are told late, or dropped."""

    def __init__(self, labels: Sequence[str], allowance: Allowance, clips: Optional[Clips] = None) -> None:
        self._labels = frozenset(labels)
        self._allowance = allowance
        self._clips = clips
        self._lives: Dict[int, _Life] = {}
        self._crossed: Dict[int, List[Dict[str, str]]] = {}
        self._waiting: Set[int] = set()
        self._pictured_s = -math.inf
        self.present: Dict[str, int] = {}

    @property
    def open_ids(self) -> Tuple[str, ...]:
        return tuple(life.id for life in self._lives.values())

    def concerns(self, label: str) -> bool:
        return not self._labels or label in self._labels

    def change(self, labels: Sequence[str], clips: Optional[Clips]) -> None:
        self._labels = frozenset(labels)
        self._clips = clips

    def forget_pictures(self) -> None:
        """Snapshots that wait to be told may show what must not be seen any more."""
        for life in self._lives.values():
            life.snapshot, life.snapshot_box = b"", None

    def update(self, scene: Scene) -> List[Event]:
        """Events of one frame."""
        for crossing in scene.crossings:
            self._crossed.setdefault(crossing.track, []).append({"line": crossing.line, "direction": crossing.direction})
        events = []
        self.present = {}
        for track in scene.update.tracks:
            life = self._lives.get(track.track)
            if life is None and not (track.is_confirmed and self.concerns(track.label)):
                continue
            if self.concerns(track.label):
                self.present[track.label] = self.present.get(track.label, 0) + 1
            event = self._begun(track, scene) if life is None else self._followed(life, track, scene)
            if event is not None:
                events.append(event)
        for track in scene.update.ended:
            events.extend(self._ended(track.track, track, scene.at_s, scene.unix_s, (scene.width, scene.height)))
        return events

    def _begun(self, track: Track, scene: Scene) -> Optional[Event]:
        if not track.is_seen or scene.at_s - track.first_s < SETTLED_S:
            return None
        if len(self._lives) >= MAX_OPEN or not self._allowance.take():
            self._waiting.add(track.track)
            return None
        self._waiting.discard(track.track)
        started_s = scene.unix_s - (scene.at_s - track.first_s)
        life = self._lives[track.track] = _Life(fresh_id(started_s), track, started_s, told_s=scene.at_s)
        if self._clips is not None and self._clips.begin(life.id, track.label, scene.at_s - track.first_s):
            life.clip = f"{life.id}.mp4"
        self._note(life, track, scene)
        self._picture(life, scene, is_first=True)
        return self._event("new", life, None, (scene.width, scene.height))

    def _followed(self, life: _Life, track: Track, scene: Scene) -> Optional[Event]:
        self._note(life, track, scene)
        if track.is_seen:
            self._picture(life, scene)
        if life.state() == life.told or scene.at_s - life.told_s < UPDATE_S or not self._allowance.take():
            return None
        life.told_s = scene.at_s
        return self._event("update", life, None, (scene.width, scene.height))

    def _note(self, life: _Life, track: Track, scene: Scene) -> None:
        life.track = track
        life.top_score = max(life.top_score, track.score)
        life.stay = scene.stays.get(track.track, NOWHERE)
        life.crossed = self._crossed.get(track.track, life.crossed)

    def _picture(self, life: _Life, scene: Scene, is_first: bool = False) -> None:
        quality = quality_of(life.track, scene.width, scene.height)
        is_time = scene.at_s - self._pictured_s >= PICTURE_S or scene.at_s == self._pictured_s
        if is_first or (quality > BETTER * life.quality and is_time):
            self._pictured_s = scene.at_s
            life.quality, life.snapshot, life.snapshot_box = quality, scene.jpeg(), _box(life.track)

    def _ended(self, number: int, track: Track, at_s: float, unix_s: float, size: Tuple[int, int]) -> List[Event]:
        self._crossed.pop(number, None)
        life = self._lives.pop(number, None)
        if life is None:
            self._allowance.dropped += number in self._waiting
            self._waiting.discard(number)
            return []
        if self._clips is not None and life.clip is not None:
            self._clips.end(life.id, at_s - track.last_s)
        life.stay = Stay((), life.stay.entered, life.stay.dwell_s, ())
        return [self._event("end", life, unix_s - (at_s - track.last_s), size)]

    @staticmethod
    def _event(kind: str, life: _Life, ended_s: Optional[float], size: Tuple[int, int]) -> Event:
        track, jpeg, box = life.track, life.snapshot, life.snapshot_box
        life.told, life.snapshot, life.snapshot_box = life.state(), b"", None
        data = {
            "id": life.id,
            "type": kind,
            "label": track.label,
            "track": track.track,
            "score": round(track.score, 3),
            "top_score": round(life.top_score, 3),
            "box": _box(track),
            "width": size[0],
            "height": size[1],
            "started_s": round(life.started_s, 3),
            "ended_s": None if ended_s is None else round(ended_s, 3),
            "zones": list(life.stay.zones),
            "entered_zones": list(life.stay.entered),
            "dwell_s": {name: round(seconds, 2) for name, seconds in life.stay.dwell_s.items()},
            "is_loitering": list(life.stay.loitering),
            "crossed": list(life.crossed),
            "has_snapshot": bool(jpeg),
            "snapshot_box": box,
            "clip": life.clip,
        }
        return Event("object", data, jpeg)


def fresh_id(started_s: float) -> str:
    """Unique without a memory: two objects of one millisecond and the same 24 random bits are one in 16 million."""
    return f"{max(0, round(started_s * 1000))}-{os.urandom(3).hex()}"


def quality_of(track: Track, width: int, height: int) -> float:
    """How good a picture of the object this is: large, sure, and not cut off by the edge of the frame."""
    area = max(0.0, track.x1 - track.x0) * max(0.0, track.y1 - track.y0) / (width * height)
    is_cut = track.x0 <= 1 or track.y0 <= 1 or track.x1 >= width - 1 or track.y1 >= height - 1
    return track.score * math.sqrt(area) * (AT_THE_EDGE if is_cut else 1.0)


def _box(track: Track) -> List[float]:
    return [round(value, 1) for value in (track.x0, track.y0, track.x1, track.y1)]
