"""How long a camera may be silent before it is given up: several times its own period, which nobody tells and it has to be learnt."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Deque, Optional

PERIODS = 5.0
LEARNT_FROM = 2  # pauses between frames
REMEMBERED = 9


class Patience:
    """`limit_s` is never below `least_s`. A connection that fell silent before it had shown its period may be one of a camera that is
    slower than the limit: the next one is waited for twice as long, up to `most_s`.

    For one thread; others may read `limit_s`.
    """

    def __init__(self, least_s: float, most_s: float = 60.0) -> None:
        self._least_s = least_s
        self._most_s = max(least_s, most_s)
        self._pauses_s: Deque[float] = deque(maxlen=REMEMBERED)
        self._frame_s: Optional[float] = None
        self.limit_s = least_s

    def connect(self) -> None:
        """A new connection begins; what is known of the period stays until it shows its own."""
        self._pauses_s.clear()
        self._frame_s = None

    def see(self, at_s: float) -> None:
        """A frame came at `at_s`."""
        if self._frame_s is not None:
            self._pauses_s.append(at_s - self._frame_s)
        self._frame_s = at_s
        if len(self._pauses_s) >= LEARNT_FROM:
            # The middle one: what was late once is not the period.
            self.limit_s = min(self._most_s, max(self._least_s, PERIODS * median(self._pauses_s)))

    def lose_to_silence(self) -> None:
        """The connection was given up, since nothing came within the limit."""
        if len(self._pauses_s) < LEARNT_FROM:
            self.limit_s = min(self._most_s, 2 * self.limit_s)
