"""From detections to what they mean: who is who, who crossed which line, who is in which zone, what is worth telling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from agent.worker.events import Allowance, Event
from agent.worker.lines import Crossing, Direction, LineCounter
from agent.worker.objects import Clips, Objects, Scene
from agent.worker.settings import PipelineSettings
from agent.worker.tracker import Track, Tracker, TrackerSettings, Update
from agent.worker.zones import ZoneWatch
from models.tasks.detection import Detection

SHOWN_S = 0.5

Counts = Dict[Direction, Dict[str, int]]


@dataclass(frozen=True)
class Moment:
    """When a frame was taken, by the frames' clock and in Unix seconds; how large it is; `jpeg` encodes it, without drawings."""

    at_s: float
    unix_s: float
    width: int
    height: int
    jpeg: Callable[[], bytes]


class Meaning:
    """One camera's. Its settings may change at any time, without a track losing its number or an event its id."""

    def __init__(self, settings: PipelineSettings, threshold: float, clips: Optional[Clips] = None) -> None:
        self._settings = settings
        self._allowance = Allowance()
        self._tracker = Tracker(tracker_settings(threshold, settings.fps, settings.thresholds))
        self._objects = Objects(settings.labels, self._allowance, clips)
        self._zones = ZoneWatch(settings.zones)
        self._counters: Dict[str, LineCounter] = {}
        self._counts: Dict[str, Counts] = {}
        self._size = (0, 0)
        self._last = (0.0, 0.0)

    def change(self, settings: PipelineSettings, clips: Optional[Clips] = None) -> None:
        before, self._settings = self._settings, settings
        self._objects.change(settings.labels, clips)
        self._zones.change(settings.zones)
        names = {line.name for line in settings.all_lines}
        self._counts = {name: counts for name, counts in self._counts.items() if name in names}
        if settings.masks != before.masks:
            self._objects.forget_pictures()

    def expect(self, threshold: float, fps: float) -> None:
        """From which score on a detection is sure, and how many frames a second to reckon with."""
        self._tracker.settings = tracker_settings(threshold, fps, self._settings.thresholds)

    def see(self, found: Sequence[Detection], moment: Moment) -> Tuple[List[Event], Tuple[Track, ...]]:
        """Events of one frame, and the tracks that are worth showing in it."""
        return self._understood(self._tracker.update(found, moment.at_s), moment)

    def see_nothing_moved(self, moment: Moment) -> Tuple[List[Event], Tuple[Track, ...]]:
        """The same for a frame that is like the last one: nobody came or went, but who stays may begin to loiter. Not while
        another look is needed: who is gone, hidden or new, a picture alone does not tell."""
        return self._understood(self._tracker.hold(moment.at_s), moment)

    @property
    def needs_another_look(self) -> bool:
        return self._tracker.needs_another_look

    def _understood(self, update: Update, moment: Moment) -> Tuple[List[Event], Tuple[Track, ...]]:
        size = (moment.width, moment.height)
        self._allowance.pass_to(moment.at_s)
        crossings = [crossing for counter in self._lines(size) for crossing in counter.update(update.tracks, moment.at_s)]
        crossings = [crossing for crossing in crossings if self._objects.concerns(crossing.label)]
        concerned = [track for track in update.tracks if self._objects.concerns(track.label)]
        stays = self._zones.update(concerned, *size, moment.at_s)
        events = [self._crossed(crossing, moment) for crossing in crossings]
        events += self._objects.update(Scene(update, crossings, stays, moment.at_s, moment.unix_s, *size, moment.jpeg))
        events += self._occupancy(moment.at_s)
        self._last = (moment.at_s, moment.unix_s)
        return events, tuple(track for track in concerned if is_shown(track, moment.at_s))

    def lose_sight(self) -> List[Event]:
        """The camera is gone: what was open ends as of the last frame, and nobody is anywhere. Track numbers go on."""
        ended = self._tracker.forget_all()
        at_s, unix_s = self._last
        # Nothing begins, so nothing is encoded.
        events = self._objects.update(Scene(Update((), ended), (), {}, at_s, unix_s, *self._size, jpeg=bytes))
        self._zones.update((), 1, 1, at_s)
        return events + self._occupancy(at_s, are_final=True)

    def totals(self) -> Counts:
        """Crossings of all lines together, by direction and label."""
        totals: Counts = {"forward": {}, "backward": {}}
        for counts in self._counts.values():
            for direction, labels in counts.items():
                for label, count in labels.items():
                    totals[direction][label] = totals[direction].get(label, 0) + count
        return totals

    def counts(self) -> Dict[str, int]:
        """Crossings of all lines and both directions together, by label."""
        return _by_label(self.totals())

    def counts_of(self, line: str) -> Dict[str, int]:
        return _by_label(self._counts.get(line, {}))

    def status(self) -> Dict[str, Any]:
        return {
            "objects": dict(self._objects.present),
            "counts": self.counts(),
            "crossed": self.totals(),
            "lines": {line.name: self._counts.get(line.name, {"forward": {}, "backward": {}}) for line in self._settings.all_lines},
            "zones": self._zones.occupancy(),
            "open_events": list(self._objects.open_ids),
            "events_dropped": self._allowance.dropped,
        }

    def _lines(self, size: Tuple[int, int]) -> List[LineCounter]:
        """A counter for each line; one that is drawn anew, or on another size of picture, begins anew. Counts stay."""
        kept = self._counters if size == self._size else {}
        self._size, self._counters = size, {}
        for line in self._settings.all_lines:
            counter = kept.get(line.name)
            self._counters[line.name] = LineCounter(line, *size) if counter is None or counter.line != line else counter
        return list(self._counters.values())

    def _crossed(self, crossing: Crossing, moment: Moment) -> Event:
        counts = self._counts.setdefault(crossing.line, {"forward": {}, "backward": {}})[crossing.direction]
        counts[crossing.label] = counts.get(crossing.label, 0) + 1
        data = {
            "line": crossing.line,
            "track": crossing.track,
            "label": crossing.label,
            "direction": crossing.direction,
            "at_s": round(moment.unix_s - (moment.at_s - crossing.at_s), 3),
            "count": self.counts_of(crossing.line)[crossing.label],
        }
        return Event("crossed", data)

    def _occupancy(self, at_s: float, are_final: bool = False) -> List[Event]:
        changes = self._zones.changes(at_s, are_final)
        return [Event("zone", {"zone": each.zone, "label": each.label, "count": each.count}) for each in changes]


def tracker_settings(threshold: float, fps: float, thresholds: Mapping[str, float]) -> TrackerSettings:
    """Tracks outlive three frames that miss them, also where there is one a second or fewer."""
    usual = TrackerSettings()
    forget_s, unsure_s = max(usual.forget_s, 3 / fps), max(usual.unsure_s, 6 / fps)
    return TrackerSettings(threshold, forget_s=forget_s, unsure_s=unsure_s, sure_of=thresholds)


def is_shown(track: Track, at_s: float) -> bool:
    """Whether to draw it: seen now, and for sure not long ago."""
    return track.is_seen and track.is_confirmed and at_s - track.sure_s <= SHOWN_S


def _by_label(counts: Counts) -> Dict[str, int]:
    return {label: sum(each.get(label, 0) for each in counts.values()) for each in counts.values() for label in each}
