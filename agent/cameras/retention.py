"""Which events have to go: too old, too many, too large, or in the way of a full disk. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Keep:
    """How much is kept. `min_free_bytes`: what the disk must have left."""

    age_s: float = 14 * DAY_S
    total_bytes: int = 4 << 30
    min_free_bytes: int = 512 << 20
    count: int = 100_000


@dataclass(frozen=True, slots=True)
class Aged:
    """What retention knows of one event; `number` grows with time, whatever the clock said."""

    number: int
    began_at: float
    is_clock_sure: bool
    is_open: bool
    size_bytes: int
    age_s: float | None = None  # how long this one is kept, where not as long as all others


def too_much(events: Sequence[Aged], keep: Keep, now: float | None, free_bytes: int) -> list[int]:
    """Numbers of the events that go, oldest first. `now` None: this node does not know the time, so nothing is too old.

    Events whose clock was not set have an age by their neighbours alone, those kept as long: they go with the first later one that is too
    old. An event that is open stays.
    """
    ordered = sorted(events, key=lambda event: event.number)
    old_until: dict[float | None, int] = {}
    for event in ordered:
        if now is not None and event.is_clock_sure and now - event.began_at > (keep.age_s if event.age_s is None else event.age_s):
            old_until[event.age_s] = event.number
    surplus = len(ordered) - keep.count
    over_bytes = sum(event.size_bytes for event in ordered) - keep.total_bytes
    missing_bytes = keep.min_free_bytes - free_bytes
    going: list[int] = []
    for event in ordered:
        helps = (over_bytes > 0 or missing_bytes > 0) and event.size_bytes > 0
        if not (event.number <= old_until.get(event.age_s, 0) or surplus > 0 or helps):
            continue
        if event.is_open:
            continue
        going.append(event.number)
        surplus -= 1
        over_bytes -= event.size_bytes
        missing_bytes -= event.size_bytes
    return going
