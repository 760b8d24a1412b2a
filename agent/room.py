"""Whether a worker's queue would refuse one request for text more, known here without asking: a worker answers between two steps only.

What it says itself counts (models/tasks/generation/waiting.py). Refused here is only what it would refuse for certain, but for a slot that
is free already because its client still reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class Place:
    """A request that the worker has or is about to get. `has_begun`: it has said something, so it waits no more."""

    tenant: str
    priority: int
    has_begun: bool = False


class Room:
    """Who asks for which model. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._places: dict[str, list[Place]] = {}

    def places(self, model: str) -> Sequence[Place]:
        return self._places.get(model, ())

    @contextmanager
    def taking(self, model: str, tenant: str, priority: int) -> Iterator[Place]:
        place = Place(tenant, priority)
        places = self._places.setdefault(model, [])
        places.append(place)
        try:
            yield place
        finally:
            places[:] = [each for each in places if each is not place]


def is_hopeless(places: Sequence[Place], tenant: str, priority: int, slots: int, queue: int) -> bool:
    """Whether nobody of a full queue would give way: nobody is less urgent, and no tenant has more waiting than this one with its new one.

    Which of those that have said nothing yet hold a slot, and so do not wait, is not known: as many of this tenant's as may.
    """
    silent = Counter(place.tenant for place in places if not place.has_begun)
    # More than have slots: the worker is done with them, and their clients read slowly.
    begun = min(len(places) - silent.total(), slots)
    if begun + silent.total() < slots + queue or any(place.priority < priority for place in places):
        return False
    own = silent.pop(tenant, 0) - max(0, slots - begun)
    return all(count <= own + 1 for count in silent.values())
