"""Guesses of what a sequence says next, for the model to check in one step: what followed when its last words occurred before.

Prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding: answers that quote, edit or fill in their prompt repeat it.
"""

from __future__ import annotations

import math
from typing import Sequence, Tuple

import numpy as np

# So many tokens must have occurred before; of several places the one that agrees longest, up to MAX_MATCH, then the latest.
MIN_MATCH, MAX_MATCH = 3, 16
MAX_DRAFT = 24
# Kept and rejected guesses that a new sequence is thought to have behind it; how much of the past each check leaves; how many kept
# ones a single check may count, so that a turn for the worse is noticed after a long right guess.
PRIOR, MEMORY, MOST_KEPT = (1.5, 1.0), 0.6, 4
# Where nothing is guessed, doubt fades by this share with each chance, so that it is tried again.
FORGIVENESS = 0.02


class Draft:
    """The tokens of one sequence so far, and how good guesses about it have been."""

    def __init__(self, prompt: Sequence[int], capacity: int) -> None:
        self._history = np.empty(capacity + 1, np.int32)
        self._count = len(prompt)
        self._history[: self._count] = prompt
        self._kept, self._rejected = PRIOR

    def append(self, token: int) -> None:
        self._history[self._count] = token
        self._count += 1

    def guess(self, most: int, price: float) -> Tuple[int, ...]:
        """At most `most` tokens; `price`: what checking one costs, as a share of what a token costs otherwise."""
        if most < 1:
            return ()
        place = self._place()
        if place < 0:
            return ()
        count = min(most, self._worth(price))
        if count < 1:
            kept, rejected = PRIOR
            self._kept += FORGIVENESS * (kept - self._kept)
            self._rejected += FORGIVENESS * (rejected - self._rejected)
            return ()
        # Behind the end of what is known it goes on as it went on before: a text that repeats itself.
        return tuple(np.resize(self._history[place : self._count], count).tolist())

    def learn(self, guessed: int, kept: int) -> None:
        """`kept` of `guessed` tokens were right; what comes after a wrong one says nothing."""
        self._kept = MEMORY * self._kept + min(kept, MOST_KEPT)
        self._rejected = MEMORY * self._rejected + (kept < guessed)

    def _worth(self, price: float) -> int:
        """Tokens whose chance to be kept is at least their price: chances multiply."""
        chance = min(self._kept / (self._kept + self._rejected), 0.98)
        return min(MAX_DRAFT, int(math.log(price) / math.log(chance))) if chance > 0 else 0

    def _place(self) -> int:
        """Where the text went on after an earlier occurrence of its last tokens; -1 if there is none."""
        history, last = self._history, self._count - 1
        ends = np.flatnonzero(history[:last] == history[last])
        place = -1
        for back in range(1, MAX_MATCH):
            ends = ends[np.searchsorted(ends, back) :]
            ends = ends[history[ends - back] == history[last - back]]
            if not len(ends):
                break
            if back + 1 >= MIN_MATCH:
                place = int(ends[-1]) + 1
        return place
