"""What one step makes of one sequence: tokens chosen from its rows of logits, as long as they are those that were guessed."""

from __future__ import annotations

from typing import List, Optional, Tuple

import numpy as np

from models.tasks.generation.constrain import GrammarError
from models.tasks.generation.sampling import Logprobs
from models.tasks.generation.sequence import Sequence


class Check:
    """`row`: of the step's logits, the first of this sequence; the next ones suppose that it goes on with `guess`.

    Each token is chosen as without a guess, with the sequence's own generator, and a wrong guess ends the check. So the guess decides how
    many tokens a step gives, never which: that keeps the distribution too (Leviathan et al. 2022, https://arxiv.org/abs/2211.17192, for
    drafts that are certain).
    """

    def __init__(self, sequence: Sequence, row: int, guess: Tuple[int, ...]) -> None:
        self.sequence = sequence
        self.guess = guess
        self.tokens: List[int] = []
        self.logprobs: List[Logprobs] = []
        self.finish: Optional[str] = None
        self._row = row

    @property
    def row(self) -> int:
        """Where the logits of the next token are."""
        return self._row + len(self.tokens)

    @property
    def goes_on(self) -> bool:
        return self.finish is None and 0 < len(self.tokens) <= len(self.guess) and self.tokens[-1] == self.guess[len(self.tokens) - 1]

    @property
    def kept(self) -> int:
        """Guessed tokens that are right."""
        differs = (index for index, (guessed, token) in enumerate(zip(self.guess, self.tokens)) if guessed != token)
        return next(differs, min(len(self.guess), len(self.tokens)))

    def allowed(self) -> Optional[np.ndarray]:
        """Which tokens may be chosen next; None: any. Where a grammar cannot tell, the sequence ends."""
        constraint = self.sequence.constraint
        try:
            return None if constraint is None else constraint.allowed()
        except GrammarError:
            self.finish = "grammar"
            return None

    def take(self, token: int, logprobs: Optional[Logprobs], capacity: int) -> None:
        before = len(self.sequence.generated)
        try:
            self.finish = self.sequence.append(token, capacity)
        except GrammarError:
            self.finish = "grammar"
        if len(self.sequence.generated) > before:
            self.tokens.append(token)
            if logprobs is not None:
                self.logprobs.append(logprobs)
