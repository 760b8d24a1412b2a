"""A camera: a thread that captures, a slot that holds the newest frame, a state that says how it is."""

from __future__ import annotations

import logging
import random
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Deque, Iterator, Optional, Sequence

from agent.worker.patience import PERIODS, Patience
from agent.worker.sources import OPEN_TIMEOUT_S, Grab, Silence, Source, SourceError, open_source
from models.pictures import Picture

LOG = logging.getLogger(__name__)

JOIN_S = 3.0
SPREAD = 0.05
RATE_WINDOW_S = 5.0
RHYTHM = 4  # pauses that say when the next frame is expected


@dataclass(frozen=True)
class Frame:
    """`captured_s` is monotonic; `at_s` is the time to reckon with: the source's own, or the same; `decode_s`: see Grab."""

    load: Callable[[], Picture]
    sequence: int
    captured_s: float
    at_s: float
    decode_s: float = 0.0


@dataclass(frozen=True)
class Backoff:
    """How long to wait after the n-th failure in a row: full jitter below a limit that doubles, and nearly all of it once it is reached.

    M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. The first waits, a minute in all, have spread the cameras of
    one recorder by then; full jitter below the last limit would only double the attempts, to 120 an hour. `reset_s` of frames end the row.
    """

    first_s: float = 1.0
    limit_s: float = 60.0
    reset_s: float = 30.0

    def delay_s(self, failures: int, share: float) -> float:
        """`share` is a random number from 0 to 1."""
        limit_s = self.first_s * 2.0 ** min(failures - 1, 30)
        return share * limit_s if limit_s < self.limit_s else self.limit_s * (1 - SPREAD * (1 - share))


@dataclass(frozen=True)
class CameraState:
    """name: connecting, streaming, stalled, backing_off, ended. `failures` in a row; `connections` that gave a frame, in all;
    `retry_at_s`: when it is tried again, while it backs off."""

    name: str
    message: str = ""
    failures: int = 0
    connections: int = 0
    retry_at_s: Optional[float] = None


class Slot:
    """Room for one frame between the camera's thread and the loop. The newest wins, and what it replaces is counted by cause:
    `busy` if the loop should have taken it (it was due), `yielding` if it would have been due at the full rate, and the device is needed
    elsewhere, `not_due` if nobody wanted it. A patient slot blocks `put` instead."""

    def __init__(self, is_patient: bool = False) -> None:
        self.is_patient = is_patient
        self.due_s = 0.0
        self.not_due = 0
        self.busy = 0
        self.yielding = 0
        self._full_period_s: Optional[float] = None  # while it yields
        self._full_due_s = 0.0
        self._frame: Optional[Frame] = None
        self._changed = threading.Condition()
        self._is_closed = False
        self._stamps: Deque[float] = deque(maxlen=600)

    @property
    def has_frame(self) -> bool:
        return self._frame is not None

    @property
    def captured_s(self) -> Optional[float]:
        """When the frame in it was captured; None: it is empty."""
        frame = self._frame
        return None if frame is None else frame.captured_s

    def yield_from(self, full_period_s: Optional[float]) -> None:
        """The device is needed elsewhere; `full_period_s`: of the rate that this costs. None: it is not."""
        with self._changed:
            if full_period_s != self._full_period_s:
                self._full_period_s, self._full_due_s = full_period_s, self.due_s

    def put(self, frame: Frame) -> None:
        with self._changed:
            if self.is_patient:
                self._changed.wait_for(lambda: self._frame is None or self._is_closed)
            elif self._frame is not None:
                self._count_lost(self._frame.captured_s)
            self._frame = frame
            self._stamps.append(frame.captured_s)

    def _count_lost(self, captured_s: float) -> None:
        period_s = self._full_period_s
        if period_s is not None and captured_s >= self._full_due_s:
            self._full_due_s = max(self._full_due_s, captured_s - period_s) + period_s
            self.yielding += 1
        elif period_s is None and captured_s >= self.due_s:
            self.busy += 1
        else:
            self.not_due += 1

    def take(self) -> Optional[Frame]:
        with self._changed:
            frame, self._frame = self._frame, None
            if frame is not None and self._full_period_s is not None:
                self._full_due_s = max(self._full_due_s, frame.captured_s) + self._full_period_s
            self._changed.notify_all()
            return frame

    def next_s(self, now_s: float) -> Optional[float]:
        """When the next frame is expected, going by the last few; None: too few came, or it is missing."""
        with self._changed:
            periods = min(RHYTHM, len(self._stamps) - 1)
            if periods < 1:
                return None
            last_s = self._stamps[-1]
            period_s = (last_s - self._stamps[-1 - periods]) / periods
        return last_s + period_s if now_s < last_s + 2 * period_s else None

    def close(self) -> None:
        """No `put` blocks any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def rate(self, now_s: float) -> float:
        """Frames per second that came in lately."""
        with self._changed:
            return rate(tuple(self._stamps), now_s)


class Camera:
    """Captures from `start` to `stop`; a source that fails is tried again for ever, with back-off."""

    def __init__(
        self,
        source: Source,
        wake: Callable[[], None],
        stall_s: float = 3.0,
        backoff: Optional[Backoff] = None,
        jitter: Callable[[], float] = random.random,
        is_patient: Optional[bool] = None,
    ) -> None:
        """`stall_s`: how long it may be silent, at least; a slow source is waited for longer (agent/worker/patience.py).

        `is_patient`: whether the source waits until its frame was looked at; None: as the source is, paced or not.
        """
        self.source = source
        self.slot = Slot(is_patient=not source.is_paced if is_patient is None else is_patient)
        # Gets each packet of an encoded source as it comes in, on the camera's thread; replaced at any time.
        self.tap: Optional[Callable[[Any], None]] = None
        self._wake = wake
        self._patience = Patience(max(stall_s, PERIODS / source.fps) if source.kind == "conveyor" else stall_s)
        self._backoff = backoff or Backoff()
        self._jitter = jitter
        self._stop = threading.Event()
        self._state = CameraState("connecting")
        self._sequence = 0
        self._last_s = 0.0
        self._streaming_since_s = 0.0
        # Not a daemon thread: one that the interpreter kills within FFmpeg takes the process down with an abort.
        self._thread = threading.Thread(target=self._run, name="camera")

    def start(self) -> None:
        self._thread.start()

    def state(self, now_s: float) -> CameraState:
        """How the camera is now: stalled from half the time after which it is given up, also where a driver hangs and cannot be."""
        state = self._state
        if state.name == "streaming" and not self.slot.is_patient and now_s - self._last_s > self._patience.limit_s / 2:
            silent_s = now_s - self._last_s
            return CameraState("stalled", f"no frame for {silent_s:.0f} s", state.failures, state.connections)
        return state

    def silent_s(self, now_s: float) -> Optional[float]:
        """Since when there was no frame; None: there was none ever."""
        return now_s - self._last_s if self._last_s else None

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ask the thread to end, without waiting."""
        self._stop.set()
        self.slot.close()

    def join(self) -> None:
        """Wait for the thread after `stop`; a read that hangs is waited for no longer than its own deadline."""
        if self._thread.is_alive():
            self._thread.join(OPEN_TIMEOUT_S + JOIN_S)
            if self._thread.is_alive():
                LOG.error("camera %s is slow, or hangs in its driver, and is left in its read", self.source.label)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._enter("connecting", self._state.message, self._state.failures)
            self._patience.connect()
            try:
                self._capture(open_source(self.source, self._stop, self._patience.limit_s, self._tapped))
                if not self._stop.is_set():
                    self._enter("ended", "the source has come to its end", 0)
                return
            except SourceError as error:
                message = str(error)
                if isinstance(error, Silence):
                    self._patience.lose_to_silence()
            except Exception as error:  # noqa: BLE001 - a driver's surprise must not end the camera silently
                # Not `exception`: a traceback ends with the error's own words, which may hold the address.
                trace = self.source.words(traceback.format_exc())
                LOG.error("camera %s failed in an unforeseen way:\n%s", self.source.label, trace)  # noqa: TRY400
                message = f"{type(error).__name__} in the driver"
            self._back_off(message)

    def _capture(self, grabs: Iterator[Grab]) -> None:
        for grab in grabs:
            now_s = time.monotonic()
            self._last_s = now_s
            self._patience.see(now_s)
            if self._state.name != "streaming":
                self._streaming_since_s = now_s
                self._enter("streaming", "", self._state.failures)
            self._sequence += 1
            self.slot.put(Frame(grab.load, self._sequence, now_s, now_s if grab.at_s is None else grab.at_s, grab.decode_s))
            if self.slot.is_patient or now_s >= self.slot.due_s - 0.5 / self.source.fps:
                self._wake()

    def _tapped(self, packet: Any) -> None:
        tap = self.tap
        if tap is not None:
            tap(packet)

    def _back_off(self, message: str) -> None:
        lasted = self._state.name == "streaming" and self._last_s - self._streaming_since_s >= self._backoff.reset_s
        failures = 1 if lasted else self._state.failures + 1
        delay_s = self._backoff.delay_s(failures, self._jitter())
        self._enter("backing_off", message, failures, time.monotonic() + delay_s)
        self._stop.wait(delay_s)

    def _enter(self, name: str, message: str, failures: int, retry_at_s: Optional[float] = None) -> None:
        connections = self._state.connections + (name == "streaming")
        self._state = CameraState(name, message, failures, connections, retry_at_s)


def rate(stamps: Sequence[float], now_s: float) -> float:
    """Per second, over the last five; 0 where there were fewer than two.

    Over a second at least: two frames that came close together, as the first after a stall do, are not yet a rate.
    """
    recent = [stamp for stamp in stamps if now_s - stamp <= RATE_WINDOW_S]
    if len(recent) < 2:
        return 0.0
    return (len(recent) - 1) / max(recent[-1] - recent[0], 1.0)
