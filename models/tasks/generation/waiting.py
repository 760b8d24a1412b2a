"""Who waits for a slot, and whose turn it is: the most urgent, then the tenant that was served least, then who came first.

Served tokens are counted as in Sheng et al. 2024, "Fairness in Serving Large Language Models", https://arxiv.org/abs/2401.00588.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import Deque, Dict, Iterator, List, Optional, Set, Tuple

from models.tasks.generation.sequence import Refused, Sequence

# Work of a token that is generated, in tokens of a prompt.
GENERATED = 4
# Tenants whose share is remembered while they ask for nothing.
MAX_TENANTS = 1024
# How long sequences lately held a slot says when there will be room; until one has ended, a guess.
RECENT, FIRST_GUESS_S = 16, 5.0
RETRY_S = (1.0, 60.0)


class Waiting:
    """At most `most` sequences beside those that have a slot to come. Full of one tenant's, it gives the place of the last of them to a
    tenant with fewer."""

    def __init__(self, most: int, overtakes: int, slots: int) -> None:
        self._most = most
        self._overtakes = overtakes
        self._slots = slots
        self._sequences: List[Sequence] = []
        self._served: Dict[str, float] = {}
        self._floor = 0.0
        self._held_s: Deque[float] = deque(maxlen=RECENT)

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def retry_after_s(self) -> float:
        """When somebody who comes now might be let in, by how long slots were held lately."""
        held_s = sum(self._held_s) / len(self._held_s) if self._held_s else FIRST_GUESS_S
        least, most = RETRY_S
        return min(most, max(least, len(self._sequences) * held_s / self._slots))

    def add(self, sequence: Sequence, busy: Set[str], free: int = 0) -> Optional[Sequence]:
        """Queue it; `busy`: tenants that hold slots; `free`: slots that nobody has yet, for they are given with the next step only.
        Returns who had to give way, if somebody had. Raises Refused("busy")."""
        out = None
        if len(self._sequences) >= self._most + free:
            out = self._last_of_most(sequence)
            self._sequences.remove(out)
        tenant = sequence.request.tenant
        if tenant not in busy and all(other.request.tenant != tenant for other in self._sequences):
            # Who asked for nothing is not owed anything.
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._floor)
            self._forget(busy)
        self._sequences.append(sequence)
        return out

    def pick(self, least_priority: float = -inf) -> Optional[Sequence]:
        """Take out the next one, of those whose own priority is `least_priority` or more; None if there is none."""
        candidates = [index for index, item in enumerate(self._sequences) if item.request.priority >= least_priority]
        if not candidates:
            return None
        served = [self._served.get(item.request.tenant, 0.0) for item in self._sequences]
        self._floor = max(self._floor, min(served))
        ranks = [(self._urgency(item), -work) for item, work in zip(self._sequences, served)]
        index = max(candidates, key=lambda at: ranks[at])  # of equals the first, which came first
        picked = self._sequences.pop(index)
        for other, rank in zip(self._sequences[:index], ranks):
            # That another tenant's turn comes first is no overtaking.
            other.overtaken += rank[0] < ranks[index][0]
        return picked

    def remove(self, sequence: Sequence) -> None:
        self._sequences.remove(sequence)

    def bill(self, tenant: str, prompt_tokens: int = 0, generated_tokens: int = 0) -> None:
        self._served[tenant] = self._served.get(tenant, 0.0) + prompt_tokens + GENERATED * generated_tokens

    def note_held(self, seconds: float) -> None:
        """A slot was free again after so long."""
        self._held_s.append(seconds)

    def _urgency(self, sequence: Sequence) -> int:
        return sequence.request.priority + sequence.overtaken // self._overtakes

    def _last_of_most(self, sequence: Sequence) -> Sequence:
        """Who gives way: the least urgent, of them the last of the tenant with most, if that is more than the newcomer's has with this."""
        counts: Dict[str, int] = {}
        for item in self._sequences:
            counts[item.request.tenant] = counts.get(item.request.tenant, 0) + 1

        def right(item: Sequence) -> Tuple[int, int]:
            return self._urgency(item), -counts[item.request.tenant]

        weakest = min(reversed(self._sequences), key=right, default=None)
        own = (sequence.request.priority, -counts.get(sequence.request.tenant, 0) - 1)
        if weakest is None or right(weakest) >= own:
            raise Refused("busy", f"{len(self._sequences)} requests wait already; try again later", self.retry_after_s)
        return weakest

    def _forget(self, busy: Set[str]) -> None:
        """Drop tenants that lose nothing by it, then, where too many are left, those that were served least."""
        if len(self._served) <= MAX_TENANTS:
            return
        here = busy | {item.request.tenant for item in self._sequences}
        idle = sorted((work, tenant) for tenant, work in self._served.items() if tenant not in here)
        for position, (work, tenant) in enumerate(idle):
            if work <= self._floor or position < len(idle) - MAX_TENANTS // 2:
                del self._served[tenant]
