"""Unix seconds for moments on the clock of a source's frames: monotonic for a live one, its own for a file."""

from __future__ import annotations

import time
from typing import Optional

SLACK_S = 0.5


class WallClock:
    """Follows steps of the system's clock, which a device without a battery takes after its start; for files read faster than they were
    filmed, where no clock fits, it counts on from the first frame."""

    def __init__(self, is_paced: bool) -> None:
        self._is_paced = is_paced
        self._ahead_s: Optional[float] = None

    def unix_s(self, at_s: float, captured_s: float) -> float:
        """`at_s` on the frames' clock; `captured_s`: the same moment on the monotonic one."""
        wall_s = time.time() - (time.monotonic() - captured_s)  # noqa: TID251  # a timestamp on the wire
        if self._ahead_s is None or (self._is_paced and abs(wall_s - at_s - self._ahead_s) > SLACK_S):
            self._ahead_s = wall_s - at_s
        return at_s + self._ahead_s
