"""What the daemon refuses for a full queue is what the worker's own queue would refuse."""

from __future__ import annotations

import random

import pytest

from agent.room import Place, Room, is_hopeless
from models.tasks.generation.sampling import Sampling
from models.tasks.generation.sequence import GenerationRequest, Refused, Sequence
from models.tasks.generation.waiting import Waiting

SLOTS, QUEUE = 2, 6


def sequence(number: int, tenant: str, priority: int) -> Sequence:
    return Sequence(GenerationRequest(number, (1, 2), 8, Sampling(), priority=priority, tenant=tenant), 16)


def is_refused(queue: Waiting, tenant: str, priority: int) -> bool:
    try:
        queue.add(sequence(99, tenant, priority), set())
    except Refused:
        return True
    return False


@pytest.mark.parametrize("seed", range(200))
def test_nothing_is_refused_here_that_the_worker_would_take(seed: int) -> None:
    chance = random.Random(seed)
    queue, places = Waiting(QUEUE, 8, SLOTS), []
    for number in range(QUEUE + SLOTS - chance.choice([0, 0, 0, 1])):
        tenant, priority = chance.choice("aab"), chance.choice([0, 0, 0, -1])
        holds_slot = number < SLOTS
        if not holds_slot:
            queue.add(sequence(number, tenant, priority), set())
        places.append(Place(tenant, priority, has_begun=holds_slot and chance.random() < 0.5))
    tenant, priority = chance.choice("abc"), chance.choice([0, 0, -1])
    if is_hopeless(places, tenant, priority, SLOTS, QUEUE):
        assert is_refused(queue, tenant, priority)


@pytest.mark.parametrize(
    ("tenants", "tenant", "priority", "is_refused"),
    [
        ("aaaaaaaa", "a", 0, True),
        ("aaaaaaa", "a", 0, False),  # one place is left
        ("aaaaaaaa", "b", 0, False),  # the biggest gives way
        ("aaaaaaaa", "a", 1, False),  # the less urgent gives way
        ("aaaaaaaa", "a", -1, True),
        ("aabbbbaa", "a", 0, False),  # whose of the silent ones hold the slots is not known here: the worker decides
    ],
)
def test_who_is_refused_at_once(tenants: str, tenant: str, priority: int, is_refused: bool) -> None:
    assert is_hopeless([Place(each, 0) for each in tenants], tenant, priority, SLOTS, QUEUE) is is_refused


def test_equal_shares_are_refused_once_the_slots_are_known() -> None:
    places = [Place("a", 0, True), Place("b", 0, True), *(Place(each, 0) for each in "aaabbb")]
    assert is_hopeless(places, "a", 0, SLOTS, QUEUE)
    assert not is_hopeless(places, "c", 0, SLOTS, QUEUE)


def test_clients_that_read_slowly_take_no_place_in_the_queue() -> None:
    stalled = [Place("a", 0, has_begun=True)] * 20
    assert not is_hopeless(stalled, "a", 0, SLOTS, QUEUE)
    assert not is_hopeless([*stalled, *[Place("a", 0)] * (QUEUE - 1)], "a", 0, SLOTS, QUEUE)
    assert is_hopeless([*stalled, *[Place("a", 0)] * QUEUE], "a", 0, SLOTS, QUEUE)


def test_places_are_given_back() -> None:
    room = Room()
    with room.taking("m", "a", 0), room.taking("m", "a", 0) as second:
        second.has_begun = True
        assert [place.has_begun for place in room.places("m")] == [False, True]
        assert not room.places("other")
    assert not room.places("m")
