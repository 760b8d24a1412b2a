"""What is wrong now, told when it begins or changes and not each time it is met."""

from __future__ import annotations

import logging

import anyio

logger = logging.getLogger(__name__)

FAULT_INTERVAL_S = 10.0


class Problems:
    """`open` is by subject: a node, `broker`, `nginx`, `rival`, `decisions`."""

    def __init__(self) -> None:
        self.open: dict[str, str] = {}
        self.faults = 0
        self._next_fault_s = 0.0

    def note(self, subject: str, problem: str) -> None:
        """An empty problem: all is well again."""
        if not problem:
            self.open.pop(subject, None)
        elif self.open.get(subject) != problem:
            logger.error("%s: %s", subject, problem)
            self.open[subject] = problem

    def dropped(self, reason: str) -> None:
        """A message that could not be used. A flood of them must not fill the log."""
        self.faults += 1
        if anyio.current_time() >= self._next_fault_s:
            self._next_fault_s = anyio.current_time() + FAULT_INTERVAL_S
            logger.warning("message dropped (%d so far): %s", self.faults, reason)
