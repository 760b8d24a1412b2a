"""KV caches: slots mapped to rows so that what runs together lies together, and the cache of a CPU generation engine."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from models.engines import EngineError
from models.engines.free_memory import granted


class SlotRows:
    """What each slot holds and in which row of the cache's memory it lies.

    A batched step needs its sequences in neighbouring rows. Callers speak of slots; the cache keeps the permutation slot → row and swaps
    rows (only the tokens they hold) when the wanted ones do not lie together. What moves in memory is the business of a subclass.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self.lengths = [0] * slots
        self.rows = list(range(slots))

    def check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise EngineError(f"slot {slot} does not exist: the engine was opened with {self.slots} slots")

    def truncate(self, slot: int, length: int) -> None:
        self.check_slot(slot)
        if not 0 <= length <= self.lengths[slot]:
            raise EngineError(f"slot {slot} holds {self.lengths[slot]} tokens and cannot be truncated to {length}")
        self.lengths[slot] = length

    def copy(self, source: int, target: int, length: int) -> None:
        self.check_slot(source)
        self.check_slot(target)
        if not 0 <= length <= self.lengths[source]:
            raise EngineError(f"slot {source} holds {self.lengths[source]} tokens; {length} of them cannot be copied to slot {target}")
        if source != target:
            self.copy_row(self.rows[source], self.rows[target], length)
        self.lengths[target] = length

    def gather(self, slots: Sequence[int]) -> int:
        """Bring `slots` into neighbouring rows; returns the first of these rows."""
        held = [0] * self.slots
        for slot, row in enumerate(self.rows):
            held[row] = self.lengths[slot]
        start, swaps = plan_rows([self.rows[slot] for slot in slots], held)
        for swap in swaps:
            self.swap_rows(swap, max(held[swap.one], held[swap.other]))
            other = {swap.one: swap.other, swap.other: swap.one}
            self.rows = [other.get(row, row) for row in self.rows]
        return start

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row to another."""
        raise NotImplementedError

    def swap_rows(self, swap: Swap, length: int) -> None:
        """Exchange the first `length` tokens of two rows."""
        raise NotImplementedError


class KeyValueCache(SlotRows):
    """float32 buffers [slots, kv_heads, capacity, head_dim], taken once and whole."""

    def __init__(self, names: Sequence[str], slots: int, kv_heads: int, capacity: int, head_dim: int) -> None:
        super().__init__(slots, capacity)
        self.buffers: Dict[str, np.ndarray] = {name: granted((slots, kv_heads, capacity, head_dim), np.float32) for name in names}

    def copy_row(self, source: int, target: int, length: int) -> None:
        for buffer in self.buffers.values():
            buffer[target, :, :length] = buffer[source, :, :length]

    def swap_rows(self, swap: Swap, length: int) -> None:
        for buffer in self.buffers.values():
            kept = buffer[swap.one, :, :length].copy()
            buffer[swap.one, :, :length] = buffer[swap.other, :, :length]
            buffer[swap.other, :, :length] = kept


class Swap(NamedTuple):
    one: int
    other: int


def plan_rows(wanted: Sequence[int], held: Sequence[int]) -> Tuple[int, List[Swap]]:
    """(first row, swaps) that make the rows `wanted` neighbours with the fewest tokens moved; `held` counts the tokens of each row."""
    best: Tuple[int, int, List[Swap]] = (-1, 0, [])
    for start in range(len(held) - len(wanted) + 1):
        window = range(start, start + len(wanted))
        outside = [row for row in wanted if row not in window]
        strangers = [row for row in window if row not in wanted]
        cost = sum(held[row] for row in outside + strangers)
        if best[0] < 0 or cost < best[0]:
            best = (cost, start, [Swap(one, other) for one, other in zip(outside, strangers)])
    return best[1], best[2]
