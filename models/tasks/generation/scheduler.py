"""Continuous batching over the slots of a generation engine: schedule → run → postprocess, synchronously, one step at a time.

The shape is that of nano-vllm (https://github.com/GeeeekExplorer/nano-vllm). Sequences join and leave between steps. A step runs one
token of every running sequence and, within a budget of `chunk_tokens`, pieces of the prompts that are not through yet, so that a long
prompt never stops the others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf
from typing import Callable, Dict, List, Optional, Tuple

import numpy as np

from models.engines import EngineError, GenerationEngine, SlotTokens
from models.tasks.generation.check import Check
from models.tasks.generation.constrain import Constraint, GrammarError
from models.tasks.generation.prefix import MIN_SHARED, longest_shared, place
from models.tasks.generation.sampling import choose, log_probabilities
from models.tasks.generation.sequence import GenerationRequest, Output, Refused, Sequence
from models.tasks.generation.waiting import Waiting

# What another token in a step costs, as a share of what a token costs otherwise, for one sequence and for several (native engine:
# 0.2 to 0.3 and 0.4 to 0.8; it falls with the number of tokens).
PRICE_ALONE, PRICE_AMONG_OTHERS = 0.25, 0.6


@dataclass(frozen=True)
class SchedulerSettings:
    """waiting: sequences that may wait for a slot, more are refused as busy; chunk_tokens: prompt tokens of one step;
    overtakes: a waiting sequence gains one priority each time so many others were let in before it; speculates: tokens that may come
    next are guessed and checked together, where the engine can verify."""

    waiting: int = 16
    chunk_tokens: int = 128
    overtakes: int = 8
    speculates: bool = True


@dataclass(frozen=True)
class Load:
    """running sequences hold a slot; tokens count since the start. `guessed_tokens` were checked, `kept_tokens` of them were right."""

    running: int
    waiting: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    guessed_tokens: int
    kept_tokens: int


def no_grammars(grammar: str) -> Constraint:
    raise GrammarError("this model takes no grammar")


class Scheduler:
    """Owns the slots of `engine`. One thread; `step` takes as long as one pass through the model. `constrain` reads grammars.

    Every sequence that `add` accepts ends with exactly one Output that has a `finish`, unless `step` raises EngineError: then the engine
    cannot be trusted any more, and the scheduler is to be thrown away with it.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        settings: Optional[SchedulerSettings] = None,
        clock: Callable[[], float] = time.monotonic,
        constrain: Callable[[str], Constraint] = no_grammars,
    ) -> None:
        self._engine = engine
        self._settings = settings or SchedulerSettings()
        self._clock = clock
        self._constrain = constrain
        self._waiting = Waiting(self._settings.waiting, self._settings.overtakes, engine.slots)
        self._running: Dict[int, Sequence] = {}
        self._ended: List[Output] = []
        self._contents: List[List[int]] = [[] for _ in range(engine.slots)]
        self._free = list(range(engine.slots))
        self._steps = 0
        self._counts = [0, 0, 0, 0, 0]

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._running or self._ended)

    @property
    def load(self) -> Load:
        return Load(len(self._running), len(self._waiting), *self._counts)

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises Refused: `invalid` with what is wrong, `busy` if too many wait.

        A full queue is shared by tenants too: another's sequence may end as `busy` to make room for this one.
        """
        problem = self._problem(request)
        if problem is not None:
            raise Refused("invalid", problem)
        try:
            constraint = self._constrain(request.grammar) if request.grammar else None
        except GrammarError as error:
            raise Refused("invalid", str(error)) from error
        sequence = Sequence(request, self._engine.vocabulary, constraint, self._clock())
        displaced = self._waiting.add(sequence, {item.request.tenant for item in self._running.values()}, len(self._free))
        if displaced is not None:
            self._ended.append(displaced.output(finish="busy"))

    @property
    def most_waiting(self) -> int:
        return self._settings.waiting

    @property
    def retry_after_s(self) -> float:
        """When a request that is refused now might be taken."""
        return self._waiting.retry_after_s

    def cancel(self, number: int) -> bool:
        """Give up a sequence now; the next step reports it as `cancelled`. False if it is not here (any more)."""
        sequence = next((item for item in [*self._waiting, *self._running.values()] if item.request.number == number), None)
        if sequence is not None:
            self._end(sequence, "cancelled")
        return sequence is not None

    def step(self) -> List[Output]:
        """One pass through the model. Raises EngineError."""
        self._expire()
        self._admit()
        batch = self._schedule()
        outputs = self._advance(batch) if batch else []
        self._steps += 1
        ended, self._ended = self._ended, []
        return ended + outputs

    def _problem(self, request: GenerationRequest) -> Optional[str]:
        capacity, vocabulary, prompt = self._engine.context_tokens, self._engine.vocabulary, request.prompt
        if not prompt:
            return "the prompt is empty"
        if len(prompt) >= capacity:
            return f"the prompt has {len(prompt)} tokens; with an answer it must fit into {capacity} tokens"
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            return f"the prompt has a token id outside the vocabulary of {vocabulary}"
        if request.max_tokens < 1:
            return f"max_tokens is {request.max_tokens}, must be at least 1"
        if any(item.request.number == request.number for item in [*self._waiting, *self._running.values()]):
            return f"a sequence numbered {request.number} is here already"
        if not 0 <= request.adapter <= len(self._engine.adapters):
            return f"there is no adapter {request.adapter}; the model has {len(self._engine.adapters)}"
        biased = next((token for token, _ in request.sampling.logit_bias if token >= vocabulary), None)
        if biased is not None:
            return f"logit_bias has token {biased}, outside the vocabulary of {vocabulary}"
        return request.sampling.problem()

    def _expire(self) -> None:
        now = self._clock()
        for sequence in [item for item in [*self._waiting, *self._running.values()] if item.request.deadline <= now]:
            self._end(sequence, "deadline")

    def _admit(self) -> None:
        while self._free:
            sequence = self._waiting.pick(self._least_priority())
            if sequence is None:
                return
            placement = place(sequence.prompt_keys, self._contents, self._free)
            slot, shared = placement.slot, placement.shared
            if placement.source == slot or not shared:
                self._engine.truncate(slot, shared)
            else:
                self._engine.copy(placement.source, slot, shared)
            self._contents[slot] = list(sequence.prompt_keys[:shared])
            self._free.remove(slot)
            sequence.slot, sequence.cached_tokens, sequence.admitted_s = slot, shared, self._clock()
            self._waiting.bill(sequence.request.tenant, prompt_tokens=len(sequence.request.prompt) - shared)
            self._running[slot] = sequence
            self._counts[0] += len(sequence.request.prompt)
            self._counts[1] += shared

    def _least_priority(self) -> float:
        """What can wait (a batch) leaves one slot of several to what cannot: nothing that runs is ever stopped for something else."""
        patient = sum(sequence.request.priority < 0 for sequence in self._running.values())
        return 0 if 0 < self._engine.slots - 1 <= patient else -inf

    def _schedule(self) -> List[SlotTokens]:
        """One token of each running sequence, then pieces of prompts within the budget."""
        batch: List[SlotTokens] = []
        prompts: List[Tuple[int, Sequence]] = []
        for slot, sequence in self._running.items():
            if sequence.generated:
                batch.append(self._guessed(slot, sequence))
            else:
                prompts.append((slot, sequence))
        budget = self._settings.chunk_tokens
        for slot, sequence in self._prompt_order(prompts):
            if budget > 0:
                self._borrow(slot, sequence)
                piece = sequence.pending(len(self._contents[slot]))[:budget]
                batch.append(SlotTokens(slot, piece, sequence.request.adapter))
                budget -= len(piece)
        return batch

    def _guessed(self, slot: int, sequence: Sequence) -> SlotTokens:
        """The newest token of a running sequence, and what may follow it."""
        tokens = sequence.pending(len(self._contents[slot]))
        if self._settings.speculates and self._engine.can_verify:
            tokens += sequence.guess(self._engine.context_tokens, PRICE_ALONE if len(self._running) == 1 else PRICE_AMONG_OTHERS)
        return SlotTokens(slot, tokens, sequence.request.adapter, logits=len(tokens))

    def _borrow(self, slot: int, sequence: Sequence) -> None:
        """Copy what another slot has computed of this prompt since it was let in: equal system prompts that come at once."""
        held, prompt = len(self._contents[slot]), sequence.prompt_keys
        source, shared = longest_shared(prompt, self._contents, (slot,))
        if source != slot and shared >= held + MIN_SHARED:
            self._engine.copy(source, slot, shared)
            self._contents[slot] = list(prompt[:shared])
            sequence.cached_tokens += shared - held
            self._counts[1] += shared - held

    def _prompt_order(self, prompts: List[Tuple[int, Sequence]]) -> List[Tuple[int, Sequence]]:
        """Every other step belongs to the prompt that was let in first, so that it comes through whatever arrives; the steps between to
        the most urgent one with the least left, so that a short prompt need not wait for a long one before it."""
        if self._steps % 2 == 0:
            return prompts

        def order(item: Tuple[int, Sequence]) -> Tuple[int, int]:
            slot, sequence = item
            return -sequence.request.priority, len(sequence.request.prompt) - len(self._contents[slot])

        return sorted(prompts, key=order)

    def _advance(self, batch: List[SlotTokens]) -> List[Output]:
        logits = self._engine.step(batch)
        checks: List[Check] = []
        row = 0
        for item in batch:
            sequence, held = self._running[item.slot], self._contents[item.slot]
            # What was guessed counts as held when it turns out right.
            guess = tuple(item.tokens[1:]) if item.logits > 1 else ()
            held.extend(sequence.keys(item.tokens[: len(item.tokens) - len(guess)]))
            if len(held) >= len(sequence.request.prompt):
                checks.append(Check(sequence, row, guess))
            row += item.logits
        going = checks
        while going:
            self._choose(logits, going)
            going = [check for check in going if check.goes_on]
        return [self._conclude(check) for check in checks]

    def _choose(self, logits: np.ndarray, checks: List[Check]) -> None:
        """One token for each. The very tokens that would be chosen one a step: a guess only says which logits are there already."""
        masks = [check.allowed() for check in checks]
        checks, masks = [check for check in checks if not check.finish], [mask for mask, check in zip(masks, checks) if not check.finish]
        if not checks:
            return
        rows = [check.row for check in checks]
        sequences = [check.sequence for check in checks]
        samplings = [sequence.request.sampling for sequence in sequences]
        wanted = logits[rows]
        try:
            tokens = choose(wanted, samplings, [item.counts for item in sequences], [item.generator for item in sequences], masks)
        except ValueError as error:
            raise EngineError(f"the model's output cannot be used: {error}; open the model again") from error
        logprobs = log_probabilities(wanted, tokens.tolist(), samplings)
        for check, token, entry in zip(checks, tokens.tolist(), logprobs):
            check.take(token, entry, self._engine.context_tokens)

    def _conclude(self, check: Check) -> Output:
        sequence, slot = check.sequence, check.sequence.slot
        if slot is not None and check.guess:
            kept = check.kept
            self._contents[slot].extend(sequence.keys(check.guess[:kept]))
            self._engine.truncate(slot, len(self._contents[slot]))
            sequence.learn(len(check.guess), kept)
            self._counts[3] += len(check.guess)
            self._counts[4] += kept
        if check.finish is not None:
            self._release(sequence)
        self._counts[2] += len(check.tokens)
        self._waiting.bill(sequence.request.tenant, generated_tokens=len(check.tokens))
        return sequence.output(tuple(check.tokens), tuple(check.logprobs), check.finish)

    def _end(self, sequence: Sequence, finish: str) -> None:
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._release(sequence)
        self._ended.append(sequence.output(finish=finish))

    def _release(self, sequence: Sequence) -> None:
        """Free the slot but keep what it holds: the next prompt may begin with it."""
        slot = sequence.slot
        if slot is not None:
            del self._running[slot]
            self._free.append(slot)
            self._waiting.note_held(self._clock() - sequence.admitted_s)
