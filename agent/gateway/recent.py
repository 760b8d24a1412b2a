"""Answers that were used lately, in memory, and the order in which they were used. Pure but for what it holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

MOST_USES = 1024  # that nobody has asked for yet


class Found(NamedTuple):
    until_s: float
    answer: bytes


class Recent:
    """The answers used last, at most `most_bytes` of them; which of them were used since `taken` was asked."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._answers: OrderedDict[str, Found] = OrderedDict()
        self._bytes = 0
        self._used: dict[str, None] = {}

    def get(self, key: str, now_s: float) -> bytes | None:
        found = self._answers.get(key)
        if found is None or found.until_s <= now_s:
            return None
        self._answers.move_to_end(key)
        self._note(key)
        return found.answer

    def put(self, key: str, found: Found) -> None:
        self.drop([key])
        self._note(key)
        if len(found.answer) > self._most_bytes // 2:
            return  # it would drive out all others
        self._answers[key] = found
        self._bytes += len(found.answer)
        while self._bytes > self._most_bytes:
            self.drop([next(iter(self._answers))])

    def drop(self, keys: Iterable[str]) -> None:
        for key in keys:
            found = self._answers.pop(key, None)
            self._bytes -= 0 if found is None else len(found.answer)

    def taken(self) -> list[str]:
        """Keys in the order of their last use."""
        used, self._used = list(self._used), {}
        return used

    def _note(self, key: str) -> None:
        self._used.pop(key, None)
        self._used[key] = None
        if len(self._used) > MOST_USES:
            del self._used[next(iter(self._used))]
