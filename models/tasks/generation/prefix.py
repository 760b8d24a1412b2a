"""Which slot a prompt gets, so that what slots still hold of older sequences is not computed again. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Sequence, Tuple

import numpy as np

# Below so many tokens a copy between slots is not worth its look-up.
MIN_SHARED = 8


@dataclass(frozen=True)
class Placement:
    """Put the prompt into `slot`; its first `shared` tokens are there already or are copied from `source`."""

    slot: int
    source: int
    shared: int


def place(prompt: Sequence[int], contents: Sequence[List[int]], free: Sequence[int]) -> Placement:
    """Choose among the `free` slots (at least one, least recently used first) for a prompt; see `longest_shared` for `contents`."""
    source, shared = longest_shared(prompt, contents, free)
    if shared < MIN_SHARED:
        return Placement(_cheapest(free, contents), source, 0)
    # In place if little is lost by it: the prompt goes on where that sequence ended.
    if source in free and (len(free) == 1 or 2 * shared >= len(contents[source])):
        return Placement(source, source, shared)
    return Placement(_cheapest([slot for slot in free if slot != source], contents), source, shared)


def longest_shared(prompt: Sequence[int], contents: Sequence[List[int]], preferred: Sequence[int] = ()) -> Tuple[int, int]:
    """(slot, tokens) of the longest beginning of `prompt` that a slot holds; of equal ones a `preferred` slot.

    contents  tokens whose keys and values each slot holds, busy slots too: a prefix may be copied from any of them. The last token of a
              prompt is never shared, because its logits are wanted.
    """
    lengths = [common_prefix(prompt[:-1], content) for content in contents]
    source = max(range(len(contents)), key=lambda slot: (lengths[slot], slot in preferred))
    return source, lengths[source]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of equal tokens at the start of both."""
    if not one or not other or one[0] != other[0]:
        return 0
    count = min(len(one), len(other))
    differs = np.flatnonzero(np.asarray(one[:count]) != np.asarray(other[:count]))
    return int(differs[0]) if len(differs) else count


def _cheapest(free: Sequence[int], contents: Sequence[List[int]]) -> int:
    """An empty slot, else the least recently used one."""
    return next((slot for slot in free if not contents[slot]), free[0])
