"""What the reader thread hands to the loop: a bounded queue of frames with a bell."""

from __future__ import annotations

import threading
from typing import Any, List, Tuple

Frame = Tuple[Any, bytes]


class Inbox:
    """Frames in order. A full inbox blocks `put`, and so, through the socket, the daemon: requests are never dropped.

    The lock is re-entrant, so `close` may be called from a signal handler that interrupts `take`.
    """

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._frames: List[Frame] = []
        self._changed = threading.Condition(threading.RLock())
        self._was_rung = False
        self.is_closed = False

    def put(self, frame: Frame) -> None:
        """Add a frame; blocks while the inbox is full. After `close` frames are dropped."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._frames) < self._capacity or self.is_closed)
            if not self.is_closed:
                self._frames.append(frame)
                self._changed.notify_all()

    def wake(self) -> None:
        """Let `take` return now, from any thread: there is work that did not come through the socket."""
        with self._changed:
            self._was_rung = True
            self._changed.notify_all()

    def close(self) -> None:
        """No more frames will come; what has not been taken is dropped."""
        with self._changed:
            self.is_closed = True
            self._frames.clear()
            self._changed.notify_all()

    def take(self, timeout_s: float) -> List[Frame]:
        """All frames that are there; waits at most `timeout_s` for the first, less if woken or closed."""
        with self._changed:
            if timeout_s > 0:
                self._changed.wait_for(lambda: self._frames or self._was_rung or self.is_closed, timeout_s)
            self._was_rung = False
            frames, self._frames = self._frames, []
            self._changed.notify_all()
            return frames
