"""Who serves when: the coordinator's decisions on plain values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.protocol.wire import Mode
from coordinator.decide import Activate, Hysteresis, Lease, NodeView, Order, Policy, Renew, StandDown, decide

POLICY = Policy(lease_s=90, renew_s=30, contingent=False, contingent_s=3600, min_active_s=300)
UP = Hysteresis(failures=3, passes=4, is_certain=True)
DOWN = replace(UP, is_down=True)
NODE = NodeView("edge-a", is_online=True, is_ready=True, mode="standby")


def full(now_s: float, given_s: float | None = None) -> Lease:
    return Lease("full", now_s + 90, now_s if given_s is None else given_s)


def orders(primary: Hysteresis, node: NodeView, now_s: float = 1000.0, policy: Policy = POLICY) -> list[Order]:
    return list(decide(policy, primary, [node], now_s))


def test_three_failures_make_it_down_and_four_passes_up_again() -> None:
    health = UP
    for good in [False, False, True, False, False, False]:
        assert not health.is_down
        health = health.after_probe(good)
    assert health.is_down
    for good in [True, True, False, True, True, True]:
        health = health.after_probe(good)
    assert health.is_down, "a failure among the passes starts the count again"
    assert not health.after_probe(True).is_down


def test_a_new_coordinator_is_not_certain_before_four_passes_or_three_failures() -> None:
    health = Hysteresis(failures=3, passes=4)
    for good in [True, True, True, False, False, True, True, True]:
        health = health.after_probe(good)
        assert not health.is_certain
    assert health.after_probe(True).is_certain
    for _ in range(3):
        health = health.after_probe(False)
    assert health.is_down and health.is_certain


@pytest.mark.parametrize("mode", ["active", "autonomous"])
def test_nobody_who_serves_is_sent_home_on_a_guess(mode: Mode) -> None:
    unsure = replace(UP, is_certain=False)
    assert orders(unsure, replace(NODE, mode=mode)) == []
    held = replace(NODE, mode=mode, lease=full(1000.0, given_s=0.0))
    assert orders(unsure, held, 1031.0) == [Renew("edge-a", 90)]
    assert orders(UP, held, 1031.0) == [StandDown("edge-a")]


def test_a_ready_node_is_activated_while_the_primary_is_down() -> None:
    assert orders(DOWN, NODE) == [Activate("edge-a", "full", 90)]


@pytest.mark.parametrize("change", [{"is_online": False}, {"is_ready": False}, {"is_drained": True}, {"retry_at_s": 1001.0}])
def test_a_node_that_cannot_or_must_not_serve_is_left_alone(change: dict[str, object]) -> None:
    assert orders(DOWN, replace(NODE, **change)) == []  # type: ignore[arg-type]  # the fields of the table above


def test_a_full_lease_is_renewed_when_due_and_not_before() -> None:
    node = replace(NODE, mode="active", lease=full(1000.0))
    assert orders(DOWN, node, 1029.0) == []
    assert orders(DOWN, node, 1030.0) == [Renew("edge-a", 90)]
    soon_over = replace(NODE, mode="active", lease=Lease("full", 1005.0, 1000.0))  # held since before this coordinator began
    assert orders(DOWN, soon_over, 1000.0) == [Renew("edge-a", 90)]


def test_a_contingent_lease_becomes_a_full_one() -> None:
    node = replace(NODE, lease=Lease("contingent", 5000.0, 900.0))
    assert orders(DOWN, node) == [Activate("edge-a", "full", 90)]


def test_a_lease_that_ran_out_is_given_anew() -> None:
    assert orders(DOWN, replace(NODE, lease=full(900.0)), 1000.0) == [Activate("edge-a", "full", 90)]


def test_an_active_node_stands_down_after_its_least_time() -> None:
    node = replace(NODE, mode="active", lease=full(1000.0, given_s=800.0))
    assert orders(UP, node, 1000.0) == []
    assert orders(UP, node, 1050.0) == [Renew("edge-a", 90)], "kept alive until it may go"
    assert orders(UP, replace(node, lease=full(1100.0, given_s=800.0)), 1100.0) == [StandDown("edge-a")]


def test_a_node_that_serves_by_its_own_right_is_called_back() -> None:
    assert orders(UP, replace(NODE, mode="autonomous")) == [StandDown("edge-a")]


def test_warm_nodes_hold_contingent_leases_while_all_is_well() -> None:
    policy = replace(POLICY, contingent=True)
    assert orders(UP, NODE, policy=policy) == [Activate("edge-a", "contingent", 3600)]
    held = replace(NODE, lease=Lease("contingent", 4600.0, 1000.0))
    assert orders(UP, held, 2799.0, policy) == []
    assert orders(UP, held, 2800.0, policy) == [Renew("edge-a", 3600)]


@pytest.mark.parametrize("mode", ["starting", "draining", "degraded"])
def test_only_a_node_that_stands_by_gets_a_contingent_lease(mode: Mode) -> None:
    assert orders(UP, replace(NODE, mode=mode), policy=replace(POLICY, contingent=True)) == []
