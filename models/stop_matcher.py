"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from typing import Sequence, Tuple


class StopMatcher:
    """Finds the first of some strings in text that comes in pieces; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string is empty; leave it out")
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> Tuple[str, bool]:
        """(text that is safe to give out, whether a stop string was met: then nothing after it counts, and it is not given out)."""
        self._held += text
        found = [index for index in (self._held.find(stop) for stop in self._stops) if index >= 0]
        if found:
            safe, self._held = self._held[: min(found)], ""
            return safe, True
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        safe, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return safe, False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, less than the whole of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
