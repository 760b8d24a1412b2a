from __future__ import annotations

import random
from dataclasses import replace

import pytest

from agent.gateway.breaker import Breaker, BreakerPolicy, Closed, HalfOpen, Open, RetryBudget, failed, next_look_s, succeeded, tick
from agent.gateway.classify import FACTS, Failure, Kind

POLICY = BreakerPolicy()
REFUSED = Failure("refused")


def after(state: Breaker, *failures: Failure, now_s: float = 100.0, by_probe: bool = False, draw: float = 1.0) -> Breaker:
    for failure in failures:
        state = failed(state, failure, now_s, POLICY, draw, by_probe)
    return state


def test_three_refusals_in_a_row_open_it_and_a_good_answer_between_them_does_not() -> None:
    assert isinstance(after(Closed(), REFUSED, REFUSED), Closed)
    state = after(Closed(), REFUSED, REFUSED, REFUSED)
    assert state == Open(100.0, 105.0, 5.0, REFUSED)
    spared = succeeded(after(Closed(), REFUSED, REFUSED), 100.0, POLICY, by_probe=False)
    assert isinstance(after(spared, REFUSED, REFUSED), Closed)


@pytest.mark.parametrize("kind", ["first_token_timeout", "keep_alive_only", "stalled", "first_byte_timeout", "connect_timeout"])
def test_failures_that_clients_waited_for_open_it_at_the_second(kind: Kind) -> None:
    assert isinstance(after(Closed(), Failure(kind)), Closed)
    assert isinstance(after(Closed(), Failure(kind), Failure(kind)), Open)


@pytest.mark.parametrize(("kind", "pause_s"), [("no_balance", 300.0), ("unauthorised", 300.0), ("tls", 30.0)])
def test_what_only_people_can_mend_opens_it_at_once_and_for_long(kind: Kind, pause_s: float) -> None:
    state = after(Closed(), Failure(kind), draw=0.0)
    assert isinstance(state, Open)
    assert state.until_s == 100.0 + pause_s


def test_half_of_the_answers_failing_opens_it_though_never_three_in_a_row() -> None:
    state: Breaker = Closed()
    for _ in range(4):
        state = after(succeeded(state, 100.0, POLICY, by_probe=False), REFUSED)
    assert isinstance(state, Closed)
    state = after(succeeded(state, 100.0, POLICY, by_probe=False), REFUSED)
    assert isinstance(state, Open)


def test_a_stated_wait_is_kept_and_never_shortened_by_chance() -> None:
    for draw in (0.0, 0.5, 1.0):
        state = after(Closed(), Failure("rate_limited", retry_after_s=40.0, weight=3.0), draw=draw)
        assert isinstance(state, Open)
        assert 140.0 <= state.until_s <= 144.0


def test_one_clients_own_empty_account_moves_nothing() -> None:
    state: Breaker = Closed()
    for _ in range(50):
        state = after(state, Failure("no_balance", weight=0.0))
    assert state == Closed()


def test_it_closes_by_two_probes_and_only_by_probes() -> None:
    state = after(Closed(), REFUSED, REFUSED, REFUSED)
    assert tick(state, 104.9) == state
    state = tick(state, 105.0)
    assert isinstance(state, HalfOpen)
    assert succeeded(state, 105.0, POLICY, by_probe=False) == state, "an old stream that ends well is no proof"
    assert failed(state, REFUSED, 105.0, POLICY, 1.0, by_probe=False) == state, "nor is one that ends badly"
    state = succeeded(state, 105.0, POLICY, by_probe=True)
    assert isinstance(state, HalfOpen)
    assert next_look_s(state, 0, 30.0) == 106.0
    assert succeeded(state, 106.0, POLICY, by_probe=True) == Closed(since_s=106.0, pause_s=5.0)


def test_pauses_double_up_to_their_bound_and_the_outage_keeps_its_beginning() -> None:
    state = after(Closed(), REFUSED, REFUSED, REFUSED)
    pauses = []
    for _ in range(6):
        assert isinstance(state, Open)
        pauses.append(state.pause_s)
        now_s = state.until_s
        state = failed(tick(state, now_s), REFUSED, now_s, POLICY, 1.0, by_probe=True)
    assert pauses == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    assert isinstance(state, Open)
    assert state.since_s == 100.0


def test_a_relapse_waits_longer_than_a_first_failure_and_a_steady_time_forgives() -> None:
    back = Closed(since_s=200.0, pause_s=20.0)
    soon, late = after(back, *[REFUSED] * 3, now_s=230.0), after(back, *[REFUSED] * 3, now_s=261.0)
    assert isinstance(soon, Open)
    assert isinstance(late, Open)
    assert (soon.pause_s, late.pause_s) == (40.0, 5.0)


def test_when_to_look_next() -> None:
    assert next_look_s(Closed(), 70.0, 30.0) == 100.0
    assert next_look_s(after(Closed(), REFUSED), 70.0, 30.0) == 75.0, "in doubt it looks sooner"
    assert next_look_s(Open(0, 55.0, 5, REFUSED), 70.0, 30.0) == 55.0


def test_random_histories_never_wedge_it() -> None:
    """Whatever happened before: once the primary answers for good, it is closed within its longest pause and two probes."""
    chance = random.Random(7)
    kinds = list(FACTS)
    for _ in range(300):
        state: Breaker = Closed()
        now_s = 0.0
        for _ in range(60):
            now_s += chance.expovariate(0.5)
            state = tick(state, now_s)
            by_probe = chance.random() < 0.3
            if chance.random() < 0.5:
                state = failed(state, Failure(chance.choice(kinds)), now_s, POLICY, chance.random(), by_probe)
            else:
                state = succeeded(state, now_s, POLICY, by_probe)
        started_s = now_s
        while not isinstance(state, Closed):
            now_s = max(now_s, next_look_s(state, now_s, 30.0))
            state = tick(state, now_s)
            if isinstance(state, HalfOpen):
                state = succeeded(state, now_s, POLICY, by_probe=True)
        assert now_s - started_s <= 330.0 + 2.0


def test_retries_are_a_share_of_requests() -> None:
    budget = RetryBudget(share=0.1)
    retries = 0
    for _ in range(1000):
        budget = budget.asked()
        if left := budget.spent():
            budget, retries = left, retries + 1
    assert 95 <= retries <= 102
    assert replace(budget, left=10.0).asked().left == 10.0
