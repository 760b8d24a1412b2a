"""One camera's way from frames to tracks, events and pictures."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Deque, Dict, List, Optional, Sequence, Tuple

import numpy as np

from agent.worker.camera import Camera, Frame, rate
from agent.worker.events import Announcer, Event
from agent.worker.sources import SourceError, parse_source
from agent.worker.tracker import Track, Tracker, TrackerSettings
from agent.worker.zones import Line, LineCounter
from models.engines import EngineError
from models.pictures import Picture, draw_detections, draw_line, encode_jpeg
from models.record import RecordError
from models.tasks.detection import Detection, Detector

UNSURE = 0.4
STALE_S = 1.0
RETRY_S = 5.0
EARLY = 0.2
SHOWN_S = 0.5
WINDOW = 200


@dataclass(frozen=True)
class PipelineSettings:
    """What a camera pipeline does.

    source     `conveyor:`, `file:/path`, `rtsp://…`, `rtsps://…`, `http(s)://…`, `v4l2:/dev/video0`; options of a file or the conveyor
               follow a `?`, see agent/worker/sources.py
    fps        frames looked at per second, at most
    threshold  score from which something counts as seen; None: the model's own
    labels     what to report and count; empty: everything
    line       where to count; None: nowhere
    width, height  size of a rendered source
    """

    id: str
    source: str
    model: str
    fps: float = 10.0
    threshold: Optional[float] = None
    labels: Tuple[str, ...] = ()
    line: Optional[Line] = None
    width: int = 640
    height: int = 360

    def check(self) -> None:
        """Raises RecordError where a value cannot be used."""
        if not 0 < self.fps <= 120:
            raise RecordError(f"pipeline {self.id}: fps {self.fps} is not in 0..120")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise RecordError(f"pipeline {self.id}: threshold {self.threshold} is not between 0 and 1")
        try:
            parse_source(self.source, self.width, self.height, self.fps)
            if self.line is not None:
                LineCounter(self.line, self.width, self.height)
        except ValueError as error:
            raise RecordError(f"pipeline {self.id}: {error}") from error


@dataclass
class Watchers:
    """Until when, how often and how somebody looks."""

    until_s: float = 0.0
    period_s: float = 0.1
    annotated: bool = True
    due_s: float = 0.0

    def want(self, now_s: float) -> bool:
        return now_s < self.until_s and now_s >= self.due_s


@dataclass(frozen=True)
class Look:
    """The outcome of one frame. `jpeg` only if somebody watches."""

    events: Tuple[Event, ...]
    tracks: Tuple[Track, ...]
    sequence: int
    age_ms: float
    jpeg: Optional[bytes] = None


class Pipeline:
    """Belongs to the worker's loop; only its camera has a thread of its own."""

    def __init__(self, settings: PipelineSettings, detector: Detector, camera: Camera) -> None:
        self.settings = settings
        self.camera = camera
        self.watchers = Watchers()
        self.detector = detector
        self._threshold = detector.facts.threshold if settings.threshold is None else settings.threshold
        self._tracker = Tracker(TrackerSettings(sure=self._threshold))
        self._announcer = Announcer(settings.labels)
        self._counter: Optional[LineCounter] = None
        self._size = (0, 0)
        self._state = ""
        self._error = ""
        self._shown_s = 0.0
        self._looks: Deque[float] = deque(maxlen=WINDOW)
        self._ages: Deque[float] = deque(maxlen=WINDOW)
        self._latencies: Deque[float] = deque(maxlen=WINDOW)
        self._processed = self._stale = 0
        camera.slot.due_s = time.monotonic()

    def due_s(self, now_s: float) -> Optional[float]:
        """Since when a frame waits to be looked at; None: there is none, or it is not time yet."""
        slot, period_s = self.camera.slot, 1 / self.settings.fps
        captured_s = slot.captured_s
        if captured_s is None:
            return None
        # A frame from before its time is left for the fresher one that is about to come, unless that stays away.
        is_time = slot.is_patient or captured_s >= slot.due_s - EARLY * period_s or now_s >= slot.due_s + period_s
        return slot.due_s if is_time else None

    def camera_events(self) -> List[Event]:
        """One event for each new state of the camera since the last call; a state that was over at once stays unsaid."""
        state = self.camera.state(time.monotonic())
        # Every try to reconnect passes through `connecting`: that is no news.
        name = "backing_off" if state.name == "connecting" and state.failures else state.name
        if name == self._state:
            return []
        before, self._state = self._state, name
        return [Event("camera", {"state": name, "before": before, "message": state.message})]

    def look(self) -> Optional[Look]:
        """Take the newest frame, find, track, count. None: it was too old, or could not be looked at."""
        slot, started_s = self.camera.slot, time.monotonic()
        frame = slot.take()
        # Behind by more than a period: that time is lost, not caught up.
        slot.due_s = max(slot.due_s, started_s - 2 / self.settings.fps) + 1 / self.settings.fps
        if frame is None:
            return None
        if not slot.is_patient and started_s - frame.captured_s > max(STALE_S, 2 / self.settings.fps):
            self._stale += 1
            return None
        try:
            picture = frame.load()
            loaded_s = time.monotonic()
            found = self.detector.detect(picture, self._threshold * UNSURE)
        except (EngineError, SourceError) as error:
            self._error = str(error)
            slot.due_s = started_s + RETRY_S
            return None
        self._error = ""
        done_s = time.monotonic()
        self._latencies.append((done_s - loaded_s) * 1000)
        self._looks.append(done_s)
        self._ages.append((done_s - frame.captured_s) * 1000)
        self._processed += 1
        return self._follow(frame, picture, found)

    def _follow(self, frame: Frame, picture: Picture, found: Sequence[Detection]) -> Look:
        update = self._tracker.update(found, frame.at_s)
        crossings = self._line(picture).update(update.tracks, frame.at_s) if self.settings.line is not None else []
        self._size = (picture.shape[1], picture.shape[0])
        self._shown_s = frame.at_s
        events = self._announcer.update(update, crossings, frame.at_s)
        seen = tuple(
            track
            for track in update.tracks
            if track.is_seen and track.is_confirmed and frame.at_s - track.sure_s <= SHOWN_S and self._announcer.concerns(track.label)
        )
        now_s = time.monotonic()
        jpeg = None
        if self.watchers.want(now_s):
            self.watchers.due_s = max(self.watchers.due_s + self.watchers.period_s, now_s - self.watchers.period_s)
            jpeg = encode_jpeg(self._drawn(picture, seen) if self.watchers.annotated else picture)
        return Look(tuple(events), seen, frame.sequence, self._ages[-1], jpeg)

    def _line(self, picture: Picture) -> LineCounter:
        size = (picture.shape[1], picture.shape[0])
        if self._counter is None or self._size != size:
            self._counter, self._size = LineCounter(self.settings.line or Line(), *size), size
        return self._counter

    def _drawn(self, picture: Picture, tracks: Sequence[Track]) -> Picture:
        if self.settings.line is not None:
            picture = np.array(picture)
            counts = self._announcer.counts()
            caption = "   ".join(f"{label} {counts[label]}" for label in sorted(counts))
            draw_line(picture, self.settings.line.start, self.settings.line.end, caption)
        return draw_detections(picture, tracks)

    def status(self) -> Dict[str, Any]:
        """Plain JSON: state, rates over the last frames, ages and latencies in ms, what was skipped and why, counts since the start."""
        now_s = time.monotonic()
        camera, slot = self.camera.state(now_s), self.camera.slot
        report: Dict[str, Any] = {
            "source": self.camera.source.label,
            "model": self.settings.model,
            "state": "failed" if self._error else camera.name,
            "message": self._error or camera.message,
            "fps": round(rate(tuple(self._looks), now_s), 2),
            "camera_fps": round(slot.rate(now_s), 2),
            "processed": self._processed,
            "skipped": {"not_due": slot.not_due, "busy": slot.busy, "stale": self._stale},
            "age_ms_p50": _percentile(self._ages, 50),
            "age_ms_p95": _percentile(self._ages, 95),
            "latency_ms": _percentile(self._latencies, 50),
            "connections": camera.connections,
            "failures": camera.failures,
            "objects": self._announcer.present,
            "counts": self._announcer.counts(),
            "crossed": self._announcer.crossed,
            "events_dropped": self._announcer.dropped,
            "is_watched": now_s < self.watchers.until_s,
            "width": self._size[0],
            "height": self._size[1],
        }
        truth = self.camera.source.truth(self._shown_s)
        if truth is not None:
            report["truth"] = truth
        return report


def _percentile(values: Deque[float], percent: float) -> Optional[float]:
    if not values:
        return None
    value = float(np.percentile(values, percent))
    return round(value, 2) if math.isfinite(value) else None
