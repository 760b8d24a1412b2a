"""One text being generated: what was asked, how far it is, and what is told of it after each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, Iterable, List, Optional, Tuple

import numpy as np

from models.tasks.generation.constrain import Constraint
from models.tasks.generation.draft import MAX_DRAFT, Draft
from models.tasks.generation.sampling import Logprobs, Sampling


class Refused(ValueError):
    """A request was not taken. `code`: `invalid` (never will be) or `busy` (try again, after `retry_after_s` if that is known)."""

    def __init__(self, code: str, message: str, retry_after_s: Optional[float] = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class GenerationRequest:
    """What is asked for. `deadline` is a point of the scheduler's clock (monotonic seconds); a larger `priority` goes first.

    adapter  the number of an adapter of the engine; 0: none
    grammar  what the answer must match, in llguidance's JSON form; empty: anything
    tenant   whose request it is: of equal priority, tenants get equal shares of the model's work
    """

    number: int
    prompt: Tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: Tuple[int, ...] = ()
    priority: int = 0
    deadline: float = float("inf")
    adapter: int = 0
    grammar: str = ""
    tenant: str = ""


@dataclass(frozen=True)
class Output:
    """News of one sequence after a step.

    tokens    newly generated; a stop token is not among them
    logprobs  one entry per token if they were asked for
    finish    None while it goes on, else the last output of this sequence: `stop`, `length`, `cancelled`, `deadline`; `busy`: it gave up
              its place in the queue to another tenant's; `grammar`: what may follow could not be told any more
    cached_tokens  tokens of the prompt that were not computed because a slot still held them
    queued_s  seconds it waited for its slot; 0 if it never got one
    """

    number: int
    tokens: Tuple[int, ...]
    logprobs: Tuple[Logprobs, ...]
    finish: Optional[str]
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    queued_s: float = 0.0


class Sequence:
    """The mutable state of a request between its `add` and its last Output; owned by the scheduler."""

    def __init__(self, request: GenerationRequest, vocabulary: int, constraint: Optional[Constraint] = None, added_s: float = 0.0) -> None:
        self.request = request
        self.constraint = constraint
        self._adapter_key = request.adapter * vocabulary
        self.prompt_keys = self.keys(request.prompt)
        self.slot: Optional[int] = None
        self.added_s = added_s
        self.admitted_s = added_s
        self.generated: List[int] = []
        self.counts: Dict[int, int] = {}
        self.cached_tokens = 0
        self.overtaken = 0
        self.generator = np.random.default_rng(request.sampling.seed)
        self.draft: Optional[Draft] = None
        self._is_forced = False

    def keys(self, tokens: Iterable[int]) -> Tuple[int, ...]:
        """What a slot holds after these tokens, to be compared: with another adapter equal tokens have other keys and values."""
        return tuple(token + self._adapter_key for token in tokens) if self._adapter_key else tuple(tokens)

    def pending(self, held: int) -> Tuple[int, ...]:
        """Tokens that the engine must still be given when its slot holds `held`: the rest of the prompt, or the newest token."""
        prompt = self.request.prompt
        return prompt[held:] if held < len(prompt) else (self.generated[-1],)

    def guess(self, capacity: int, price: float) -> Tuple[int, ...]:
        """Tokens that may follow the newest one, fewer than still may be generated."""
        room = min(self.request.max_tokens, capacity - len(self.request.prompt)) - len(self.generated)
        if self.draft is None:
            self.draft = Draft([*self.request.prompt, *self.generated], capacity)
        if self.constraint is None:
            return self.draft.guess(room - 1, price)
        forced = self.constraint.forced()[: min(room - 1, MAX_DRAFT)] if room > 1 else ()
        self._is_forced = bool(forced)
        if forced:
            return forced
        guess = self.draft.guess(room - 1, price)
        return guess[: self.constraint.fitting(guess)] if guess else ()

    def learn(self, guessed: int, kept: int) -> None:
        if self.draft is not None and not self._is_forced:
            self.draft.learn(guessed, kept)

    def append(self, token: int, capacity: int) -> Optional[str]:
        """Take a sampled token; returns how the sequence ends, if it does. A stop token is not kept. Raises GrammarError."""
        if token in self.request.stop_tokens:
            return "stop"
        is_complete = self.constraint is not None and self.constraint.accept(token)
        self.generated.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        if self.draft is not None:
            self.draft.append(token)
        if is_complete:
            return "stop"
        is_full = len(self.request.prompt) + len(self.generated) >= capacity
        return "length" if is_full or len(self.generated) >= self.request.max_tokens else None

    def output(self, tokens: Tuple[int, ...] = (), logprobs: Tuple[Logprobs, ...] = (), finish: Optional[str] = None) -> Output:
        prompt, generated = len(self.request.prompt), len(self.generated)
        queued_s = self.admitted_s - self.added_s
        return Output(self.request.number, tokens, logprobs, finish, prompt, generated, self.cached_tokens, queued_s)
