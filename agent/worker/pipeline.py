"""One camera's way from frames to tracks, events and pictures."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple

import numpy as np

from agent.worker.camera import Camera, Frame, rate
from agent.worker.events import Event
from agent.worker.masks import Masks
from agent.worker.meaning import Meaning, Moment
from agent.worker.motion import MotionGate
from agent.worker.settings import PipelineSettings as PipelineSettings
from agent.worker.sources import SourceError
from agent.worker.tracker import Track
from agent.worker.views import Watchers, small_jpeg
from agent.worker.wall_clock import WallClock
from agent.worker_protocol import View
from models.engines import EngineError
from models.pictures import Picture, draw_detections, draw_line, encode_jpeg
from models.tasks.detection import Detection, Detector

if TYPE_CHECKING:
    from agent.worker.recording import Recorder

LOG = logging.getLogger(__name__)

UNSURE = 0.4
PAUSED_FPS = 0.1
RETRY_S = 5.0
EARLY = 0.2
WINDOW = 200
GONE = ("backing_off", "ended")

UnixSeconds = Callable[[float, float], float]


@dataclass(frozen=True)
class Look:
    """The outcome of one frame; `pictures` for those who watch, one for each view."""

    events: Tuple[Event, ...]
    tracks: Tuple[Track, ...]
    sequence: int
    age_ms: float
    pictures: Tuple[Tuple[View, bytes], ...] = ()


@dataclass(frozen=True)
class Taken:
    """A frame that is to be looked at, its masks applied. `due_s`, when it was to be looked at, and `began_s` are monotonic; `is_still`: it
    shows what the last one showed, and needs no detector."""

    frame: Frame
    picture: Picture
    due_s: float
    began_s: float
    is_still: bool = False


class Pipeline:
    """Belongs to the worker's loop; only its camera has a thread of its own.

    One frame: `take` it, detect in its picture, `follow` what was found; `look` does all three.
    """

    def __init__(self, settings: PipelineSettings, detector: Detector, camera: Camera, unix_s: Optional[UnixSeconds] = None) -> None:
        """`unix_s` replaces the wall clock: (at_s of a frame, when it was captured) → Unix seconds."""
        self.settings = settings
        self.camera = camera
        self.watchers: Dict[View, Watchers] = {"drawn": Watchers(), "plain": Watchers(), "small": Watchers()}
        self._pace_fps: Optional[float] = None
        self._detector = detector
        self._masks = Masks(settings.masks)
        self._gate = MotionGate(settings.motion)
        self._recorder = self._new_recorder()
        self._left: List[Recorder] = []
        self._meaning = Meaning(settings, self.threshold, self._recorder)
        self._unix_s = unix_s or WallClock(is_paced=not camera.slot.is_patient).unix_s
        self._size = (0, 0)
        self._state = ""
        self._is_alerted = False
        self._error = ""
        self._shown_s = 0.0
        self._looks: Deque[float] = deque(maxlen=WINDOW)
        self._ages: Deque[float] = deque(maxlen=WINDOW)
        self._latencies: Deque[float] = deque(maxlen=WINDOW)
        self._decodes: Deque[float] = deque(maxlen=WINDOW)
        self._processed = self._stale = self._still = self._stalls = 0
        camera.slot.due_s = time.monotonic()

    @property
    def detector(self) -> Detector:
        return self._detector

    @detector.setter
    def detector(self, detector: Detector) -> None:
        self._detector = detector
        self._reckon()

    @property
    def threshold(self) -> float:
        """Score from which a detection is sure."""
        return self._detector.facts.threshold if self.settings.threshold is None else self.settings.threshold

    @property
    def unsure(self) -> float:
        """Score from which a detection of any label may count at all, if only to hold what was seen for sure."""
        return min((self.threshold, *self.settings.thresholds.values())) * UNSURE

    def counts(self, detection: Detection, picture: Picture) -> bool:
        """Whether it is likely enough for its label, and large enough."""
        area = (detection.x1 - detection.x0) * (detection.y1 - detection.y0)
        least = self.settings.thresholds.get(detection.label, self.threshold) * UNSURE
        return detection.score >= least and area >= self.settings.min_area * picture.shape[0] * picture.shape[1]

    @property
    def fps(self) -> float:
        """Frames to look at per second: as set, or the pace while the device is needed elsewhere, but not below the floor; 0: none."""
        wanted = self.settings.fps
        return wanted if self._pace_fps is None else min(wanted, max(self._pace_fps, self.settings.floor_fps))

    @property
    def is_slowed(self) -> bool:
        return self.fps < self.settings.fps

    def slow_to(self, fps: Optional[float]) -> None:
        """Set the pace while the device is needed elsewhere; None: none."""
        self._pace_fps = fps
        self._reckon()

    def _reckon(self) -> None:
        """With another rate, or another detector."""
        self._meaning.expect(self.threshold, self.fps or PAUSED_FPS)
        self.camera.slot.yield_from(1 / self.settings.fps if self.is_slowed else None)

    def change(self, settings: PipelineSettings, detector: Detector) -> None:
        """Go on with other settings, of the same source, and with the same tracks. The settings have been checked."""
        before, self.settings, self._detector = self.settings, settings, detector
        if settings.masks != before.masks:
            self._masks = Masks(settings.masks)
        if settings.motion != before.motion:
            self._gate = MotionGate(settings.motion)
        if (settings.record, settings.media, settings.masks) != (before.record, before.media, before.masks):
            # Clips that are being made end with what was allowed so far.
            self._leave_recorder()
            self._recorder = self._new_recorder()
        self._meaning.change(settings, self._recorder)
        self._reckon()

    def due_s(self, now_s: float) -> Optional[float]:
        """Since when a frame waits to be looked at; None: there is none, or it is not time yet."""
        slot, captured_s = self.camera.slot, self.camera.slot.captured_s
        if captured_s is None or not self.fps:
            return None
        period_s = 1 / self.fps
        # A frame from before its time is left for the fresher one that is about to come, unless that stays away.
        is_time = slot.is_patient or captured_s >= slot.due_s - EARLY * period_s or now_s >= slot.due_s + period_s
        return slot.due_s if is_time else None

    def next_s(self, now_s: float) -> Optional[float]:
        """When the next frame to look at is expected; None: nobody knows, or none is wanted."""
        slot = self.camera.slot
        frame_s = slot.next_s(now_s)
        if frame_s is None or not self.fps or slot.is_patient:
            return None
        return max(frame_s, slot.due_s - EARLY / self.fps)

    @property
    def input_size(self) -> Tuple[int, int]:
        """(height, width) of the model's input for the last frame; (0, 0) before the first one."""
        width, height = self._size
        return self.detector.input_size(height, width) if height else (0, 0)

    def camera_events(self) -> List[Event]:
        """One event for each new state of the camera since the last call; a state that was over at once stays unsaid. What was seen by
        a camera that is gone ends with it. And what became of recording."""
        state = self.camera.state(time.monotonic())
        # Every try to reconnect passes through `connecting`: that is no news.
        name = "backing_off" if state.name == "connecting" and state.failures else state.name
        news = [] if self._recorder is None else self._recorder.news()
        if state.failures < self.settings.alert_failures:
            self._is_alerted = False
        elif not self._is_alerted and self.settings.alert_failures:
            self._is_alerted = True
            news.append(Event("unreachable", {"failures": state.failures, "message": state.message}))
        if name == self._state or (name == "ended" and self.camera.slot.has_frame):
            return news
        before, self._state = self._state, name
        self._stalls += name == "stalled"
        LOG.log(
            logging.WARNING if name in ("stalled", "backing_off") else logging.INFO,
            "camera %s (%s) is %s%s%s", self.settings.id, self.camera.source.label, name,
            f", was {before}" if before else "", f": {state.message}" if state.message else "",
        )  # fmt: skip
        events = news + [Event("camera", {"state": name, "before": before, "message": state.message})]
        return events + self._meaning.lose_sight() if name in GONE else events

    def close(self) -> List[Event]:
        """The last events: what is open ends, and so do its clips."""
        events = self._meaning.lose_sight()
        self._leave_recorder()
        return events

    @property
    def is_writing(self) -> bool:
        """Whether clips are still being finished after `close`."""
        return any(recorder.is_alive for recorder in self._left)

    def join(self) -> None:
        """Wait for the clips after `close`."""
        for recorder in self._left:
            recorder.join()

    def look(self) -> Optional[Look]:
        """Take the newest frame, find, track, count. None: it was too old, or could not be looked at."""
        taken = self.take()
        if taken is None:
            return None
        if taken.is_still:
            return self.follow(taken, ())
        if not self.is_fresh(taken):
            return None
        try:
            found = self.detector.detect(taken.picture, self.unsure)
        except EngineError as error:
            self.fail(error)
            return None
        return self.follow(taken, found)

    def take(self) -> Optional[Taken]:
        """The newest frame with its masks applied, and the next one's time set. None: it was too old, or could not be decoded."""
        slot, began_s = self.camera.slot, time.monotonic()
        frame, due_s = slot.take(), slot.due_s
        if frame is not None and self._is_stale(frame):
            return None  # still due: the next frame is looked at as soon as it comes
        # Behind by more than a period: that time is lost, not caught up.
        slot.due_s = max(slot.due_s, began_s - 2 / self.fps) + 1 / self.fps
        if frame is None:
            return None
        try:
            picture = self._masks.apply(frame.load())
            self._decodes.append((frame.decode_s + time.monotonic() - began_s) * 1000)
        except SourceError as error:
            self.fail(error)
            return None
        if self._recorder is not None:
            self._recorder.picture(picture, frame.captured_s)
        self._size = (picture.shape[1], picture.shape[0])
        is_still = self.settings.motion.enabled and not self._gate.lets_through(picture, frame.at_s, self._meaning.needs_another_look)
        return Taken(frame, picture, due_s, time.monotonic(), is_still)

    def is_fresh(self, taken: Taken) -> bool:
        """Whether a frame is still young enough to be looked at, to be asked right before that; one that is not counts as dropped, and the
        next one is due in its place."""
        if not self._is_stale(taken.frame):
            return True
        self.camera.slot.due_s = min(self.camera.slot.due_s, taken.due_s)
        return False

    def _is_stale(self, frame: Frame) -> bool:
        is_stale = not self.camera.slot.is_patient and time.monotonic() - frame.captured_s > self.settings.stale_s
        self._stale += is_stale
        return is_stale

    def fail(self, error: Exception) -> None:
        """A frame could not be looked at: say so, and try again in a while."""
        self._error = str(error)
        self.camera.slot.due_s = time.monotonic() + RETRY_S

    def follow(self, taken: Taken, found: Sequence[Detection]) -> Look:
        """What the detections mean, those from `unsure` on; those of a still frame do not count."""
        frame, picture = taken.frame, taken.picture
        found = [each for each in found if self.counts(each, picture)]
        done_s = time.monotonic()
        self._error = ""
        self._ages.append((done_s - frame.captured_s) * 1000)
        if taken.is_still:
            self._still += 1
        else:
            self._latencies.append((done_s - taken.began_s) * 1000)
            self._looks.append(done_s)
            self._processed += 1
        self._shown_s = frame.at_s
        encoded: List[bytes] = []

        def jpeg() -> bytes:
            if not encoded:
                encoded.append(encode_jpeg(picture))
            return encoded[0]

        unix_s = self._unix_s(frame.at_s, frame.captured_s)
        moment = Moment(frame.at_s, unix_s, *self._size, jpeg)
        events, shown = self._meaning.see_nothing_moved(moment) if taken.is_still else self._meaning.see(found, moment)
        return Look(tuple(events), shown, frame.sequence, self._ages[-1], self._watched(picture, shown, jpeg))

    def _new_recorder(self) -> Optional[Recorder]:
        wishes, camera = self.settings, self.camera
        camera.tap = None
        if not (wishes.record.enabled and wishes.media):
            return None
        from agent.worker.recording import Recorder  # only where something is recorded: a worker without does without PyAV

        recorder = Recorder(wishes.record, Path(wishes.media), self._masks, wishes.fps, camera.source.has_packets)
        recorder.start()
        camera.tap = recorder.packet if recorder.copies else None
        return recorder

    def _leave_recorder(self) -> None:
        self.camera.tap = None
        if self._recorder is not None:
            self._recorder.close()
            self._left = [each for each in self._left if each.is_alive] + [self._recorder]
            self._recorder = None

    def _watched(self, picture: Picture, shown: Sequence[Track], jpeg: Callable[[], bytes]) -> Tuple[Tuple[View, bytes], ...]:
        now_s = time.monotonic()
        encoders: Dict[View, Callable[[], bytes]] = {
            # Masked once more: a box may reach over a mask.
            "drawn": lambda: encode_jpeg(self._masks.apply(self._drawn(picture, shown))),
            "plain": jpeg,
            "small": lambda: small_jpeg(picture, self._masks),
        }
        return tuple((view, encode()) for view, encode in encoders.items() if self.watchers[view].takes(now_s))

    def _drawn(self, picture: Picture, tracks: Sequence[Track]) -> Picture:
        lines = self.settings.all_lines
        if lines:
            picture = np.array(picture)
        captions = []
        for line in lines:
            counts = self._meaning.counts_of(line.name)
            captions += [
                f"{label} {counts[label]}" if len(lines) == 1 else f"{line.name}: {label} {counts[label]}" for label in sorted(counts)
            ]
        for index, line in enumerate(lines):
            draw_line(picture, line.start, line.end, "" if index else "   ".join(captions))
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
            "fps_wanted": round(self.fps, 2),
            "is_slowed": self.is_slowed,
            "camera_fps": round(slot.rate(now_s), 2),
            "processed": self._processed,
            "skipped": {"not_due": slot.not_due, "busy": slot.busy, "yielding": slot.yielding, "stale": self._stale, "still": self._still},
            "age_ms_p50": _percentile(self._ages, 50),
            "age_ms_p95": _percentile(self._ages, 95),
            "latency_ms": _percentile(self._latencies, 50),
            "decode_ms": _percentile(self._decodes, 50),
            "silent_s": _rounded(self.camera.silent_s(now_s)),
            "retry_in_s": None if camera.retry_at_s is None else _rounded(max(0.0, camera.retry_at_s - now_s)),
            "connections": camera.connections,
            "failures": camera.failures,
            "stalls": self._stalls,
            "is_watched": any(now_s < each.until_s for each in self.watchers.values()),
            "width": self._size[0],
            "height": self._size[1],
            "masks": len(self.settings.masks),
            "recording": {"state": "off", "message": ""} if self._recorder is None else self._recorder.status(),
            **self._meaning.status(),
        }
        truth = self.camera.source.truth(self._shown_s)
        if truth is not None:
            report["truth"] = truth
        return report


def _percentile(values: Deque[float], percent: float) -> Optional[float]:
    if not values:
        return None
    return _rounded(float(np.percentile(values, percent)))


def _rounded(value: Optional[float]) -> Optional[float]:
    return round(value, 2) if value is not None and math.isfinite(value) else None
