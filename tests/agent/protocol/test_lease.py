"""Lease and epoch: rules L1-L5 and L10, by hand and as a seeded random model of reordered, repeated, delayed orders."""

from __future__ import annotations

import random
from dataclasses import replace

from agent.protocol.lease import Accept, LeaseOrder, LeaseState, Reject, Replay, decide, order_of, without_lease
from agent.protocol.messages import Command
from agent.protocol.operations import arguments
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import wire_now

ACTIVE = LeaseState(5, "five", "full", ends_at_s=190.0)


def accepted(order: LeaseOrder, state: LeaseState = ACTIVE, now_s: float = 100.0) -> LeaseState:
    decision = decide(order, state, now_s)
    assert isinstance(decision, Accept), decision
    return decision.state


def test_l1_activate_and_standby_need_a_new_epoch() -> None:
    for op in ("activate", "standby", "drain"):
        assert decide(LeaseOrder(op, "other", 5, 90.0), ACTIVE, 100.0) == Reject(
            "stale_epoch", f"{op} carries epoch 5, this node is at 5; use a higher one", 5
        )


def test_l2_lower_is_stale_equal_is_replay_or_renewal_higher_is_obeyed() -> None:
    assert isinstance(decide(LeaseOrder("standby", "old", 4), ACTIVE, 100.0), Reject)
    assert decide(LeaseOrder("activate", "five", 5, 90.0), ACTIVE, 100.0) == Replay()
    assert accepted(LeaseOrder("renew", "r", 5, 120.0)).ends_at_s == 220.0
    assert accepted(LeaseOrder("standby", "six", 6)) == LeaseState(6, "six")
    assert accepted(LeaseOrder("drain", "six", 6)).is_drained


def test_l2_a_renewal_never_shortens_nor_revives() -> None:
    assert accepted(LeaseOrder("renew", "late", 5, 90.0, age_s=60.0)).ends_at_s == 190.0
    for state, now_s in ((ACTIVE, 190.0), (LeaseState(5, "five"), 100.0), (LeaseState(5, "five", is_drained=True), 100.0)):
        decision = decide(LeaseOrder("renew", "r", 5, 90.0), state, now_s)
        assert isinstance(decision, Reject) and decision.code == "expired"
    ahead = decide(LeaseOrder("renew", "r", 9, 90.0), ACTIVE, 100.0)
    assert isinstance(ahead, Reject) and ahead.code == "stale_epoch"


def test_l3_a_coordinator_that_forgot_catches_up_from_the_rejection() -> None:
    epoch, state = 0, ACTIVE  # its database was restored
    while True:
        epoch += 1
        decision = decide(LeaseOrder("activate", f"new-{epoch}", epoch, 90.0), state, 100.0)
        if isinstance(decision, Accept):
            break
        assert isinstance(decision, Reject)
        epoch = decision.current
    assert decision.state.epoch == 6


def test_l4_the_time_under_way_counts() -> None:
    assert accepted(LeaseOrder("activate", "six", 6, 90.0, age_s=30.0)).ends_at_s == 160.0
    assert accepted(LeaseOrder("activate", "six", 6, 90.0, age_s=95.0)).held(100.0) is None
    lease = Command(
        id=new_ulid(), op="activate", node="abc", epoch=6, issued_at=wire_now(), deadline_s=30, issuer="c", args={"lease_s": 90}
    )
    assert order_of(lease, arguments(lease), -5.0) == LeaseOrder("activate", lease.id, 6, 90.0)
    assert order_of(lease.model_copy(update={"epoch": None}), arguments(lease), 0.0) is None


def test_l5_a_reboot_drops_the_lease_and_keeps_epoch_and_drain() -> None:
    state = without_lease(ACTIVE)
    assert (state.epoch, state.held(0.0)) == (5, None)
    assert without_lease(LeaseState(5, is_drained=True)).is_drained


def test_l10_two_nodes_may_hold_leases_at_once() -> None:
    first, second = (accepted(LeaseOrder("activate", name, 1, 90.0), LeaseState()) for name in ("a", "b"))
    assert first.held(100.0) == second.held(100.0) == "full"


def test_random_orders_end_in_the_last_intent() -> None:
    """2-8 intents, each with renewals, delivered 1-3 times, shuffled, with reboots between: the highest epoch wins always."""
    chance = random.Random(20_240_601)
    naive_wrong = 0
    for _ in range(6_000):
        intents = [
            LeaseOrder(chance.choice(["activate", "standby", "drain"]), f"i{epoch}", epoch, lease_s=1e6)
            for epoch in range(1, chance.randint(2, 8) + 1)
        ]
        orders = intents + [LeaseOrder("renew", f"r{order.epoch}", order.epoch, 1e6) for order in intents if chance.random() < 0.5]
        deliveries = [order for order in orders for _ in range(chance.randint(1, 3))]
        chance.shuffle(deliveries)
        state, effects, naive = LeaseState(), [], ""
        for now_s, order in enumerate(deliveries):
            decision = decide(order, state, float(now_s))
            if isinstance(decision, Accept):
                assert decision.state.epoch >= state.epoch
                if order.op != "renew":
                    effects.append(order.epoch)
                else:
                    assert state.kind is not None
                state = decision.state
            if order.op != "renew":
                naive = order.id
            if chance.random() < 0.05:
                state = without_lease(state)
        last = intents[-1]
        assert effects == sorted(set(effects)) and effects[-1] == last.epoch  # no stale and no repeated effect
        assert (state.epoch, state.last_id, state.is_drained) == (last.epoch, last.id, last.op == "drain")
        assert state.kind in ((None, "full") if last.op == "activate" else (None,))
        naive_wrong += naive != last.id
    assert naive_wrong > 1_000  # the plain rule, last command wins, does end wrong: the model can fail


def test_a_state_does_not_change_under_its_reader() -> None:
    before = replace(ACTIVE)
    decide(LeaseOrder("standby", "six", 6), ACTIVE, 100.0)
    assert before == ACTIVE
