"""A deterministic generation engine without a model, for tests of what lies above engines and for machines that have no weights.

It passes the contract test of the real ones: its logits are a function of the tokens a slot holds and of nothing else.
"""

from __future__ import annotations

import zlib
from typing import List, Sequence, Tuple

import numpy as np

from models.engines import EngineError, SlotTokens
from models.engines.decoder import check_step


class FakeGenerationEngine:
    """Logits are drawn from a generator seeded with the checksum of the slot's tokens. `steps` records every batch it was given."""

    provider = "cpu"
    can_verify = True

    def __init__(self, vocabulary: int = 97, slots: int = 4, context_tokens: int = 256, adapters: Tuple[str, ...] = ()) -> None:
        self.vocabulary = vocabulary
        self.adapters = adapters
        self.slots = slots
        self.context_tokens = context_tokens
        self.steps: List[List[SlotTokens]] = []
        self._held: List[List[int]] = [[] for _ in range(slots)]
        self._is_closed = False

    def length(self, slot: int) -> int:
        return len(self._tokens(slot))

    def step(self, batch: Sequence[SlotTokens]) -> np.ndarray:
        if self._is_closed:
            raise EngineError("the fake engine was closed; make another")
        lengths = [len(held) for held in self._held]
        check_step(batch, lengths, self.context_tokens, self.vocabulary, len(self.adapters), can_verify=True)
        self.steps.append(list(batch))
        rows: List[np.ndarray] = []
        for item in batch:
            held = self._held[item.slot]
            # An adapter changes what follows from the same tokens.
            held.extend(token + item.adapter * self.vocabulary for token in item.tokens)
            rows += [self._logits(held[: len(held) - before]) for before in reversed(range(item.logits))]
        return np.stack(rows)

    def truncate(self, slot: int, length: int) -> None:
        held = self._tokens(slot)
        if not 0 <= length <= len(held):
            raise EngineError(f"slot {slot} holds {len(held)} tokens and cannot be truncated to {length}")
        del held[length:]

    def copy(self, source: int, target: int, length: int) -> None:
        held = self._tokens(source)
        if not 0 <= length <= len(held):
            raise EngineError(f"slot {source} holds {len(held)} tokens; {length} of them cannot be copied to slot {target}")
        self._tokens(target)[:] = held[:length]

    def close(self) -> None:
        self._is_closed = True

    def _tokens(self, slot: int) -> List[int]:
        if not 0 <= slot < self.slots:
            raise EngineError(f"slot {slot} does not exist: the engine was opened with {self.slots} slots")
        return self._held[slot]

    def _logits(self, tokens: Sequence[int]) -> np.ndarray:
        seed = zlib.crc32(np.asarray(tokens, "<i4").tobytes())
        return np.random.default_rng(seed).standard_normal(self.vocabulary).astype(np.float32) * 4
