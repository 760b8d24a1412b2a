"""What the coordinator makes of silence, of a node's word on its lease, and of results that come late."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.link.broker import Received
from agent.protocol import topics
from agent.protocol.messages import Backup as Offer
from agent.protocol.messages import Command, Endpoint, Failure, Heartbeat, Meta, ModelState, Presence, Result, State
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import LeaseKind, Mode, encode, wire_now
from coordinator.decide import Lease, NodeView
from coordinator.intake import Intake
from coordinator.registry import CommandRow, Registry
from coordinator.roster import SETTLE_S, Roster

NODE = "edge-a"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    opened = Registry(tmp_path / "coordinator.sqlite")
    opened.store("presence", Presence(node=NODE, boot="b", sess=1, state="online", reason="birth", mode="standby", epoch=0, ts=wire_now()))
    yield opened
    opened.close()


@pytest.fixture
def roster(registry: Registry) -> Roster:
    return Roster(registry)


def view(roster: Roster, now_s: float) -> NodeView:
    return roster.views(now_s)[0]


def state(seq: int = 1, mode: Mode = "standby", epoch: int = 0, kind: LeaseKind | None = None, left_s: float | None = None) -> State:
    models = (ModelState(name="tiny", status="serving", task="generation"),)
    return State(node=NODE, boot="b", seq=seq, mode=mode, epoch=epoch, lease_kind=kind, lease_left_s=left_s, models=models)


def order(registry: Registry, roster: Roster, op: str, now_s: float) -> CommandRow:
    args = {"standby": {}, "renew": {"lease_s": 90.0}, "activate": {"lease_s": 90.0}}[op]
    command = Command(id=new_ulid(), op=op, node=NODE, issued_at=wire_now(), deadline_s=30.0, issuer="c", args=dict(args))
    row = registry.issue(command, 1000.0)
    roster.ordered(row, now_s, 1000.0)
    return row


def answer(row: CommandRow, status: str, code: str | None = None) -> Result:
    error = Failure(code=code, message="no") if code else None
    return Result.model_validate(
        {"id": row.command.id, "op": row.command.op, "node": NODE, "seq": 1, "status": status, "epoch": 0, "error": error}
    )


def test_r1_silence_counts_only_while_the_coordinator_listens(roster: Roster) -> None:
    assert not view(roster, 100.0).is_online
    roster.listens(100.0)
    assert view(roster, 189.0).is_online, "nobody could be heard before"
    assert not view(roster, 191.0).is_online
    roster.heard(NODE, 200.0)
    roster.listens(500.0)  # the broker was away for five minutes
    assert view(roster, 500.0).is_online


def test_r1_the_interval_is_the_nodes_own_word_within_bounds(registry: Registry, roster: Roster) -> None:
    beat = Heartbeat(node=NODE, boot="b", sess=1, seq=1, ts=wire_now(), mono=1.0, mode="standby", epoch=0, interval_s=10.0)
    for seq, (interval_s, last_s) in enumerate([(10.0, 30.0), (1e9, 900.0), (-5.0, 0.15)], 1):
        registry.store("heartbeat", beat.model_copy(update={"interval_s": interval_s, "seq": seq}))
        roster.heard(NODE, 0.0)
        assert view(roster, 0.99 * last_s).is_online
        assert not view(roster, 1.01 * last_s).is_online


def test_r1_who_fell_silent_is_not_presumed_alive_by_a_new_start(registry: Registry, roster: Roster) -> None:
    roster.listens(0.0)
    roster.watch(100.0)
    again = Roster(registry)
    again.listens(200.0)
    assert not view(again, 200.0).is_online
    assert again.why(registry.nodes()[0], 200.0) == "silent"
    again.heard(NODE, 201.0)
    assert view(again, 201.0).is_online


def test_l3_any_result_tells_the_epoch(registry: Registry, roster: Roster) -> None:
    """Also of an order that a restored record has never heard of."""
    told = Result(id=new_ulid(), op="renew", node=NODE, seq=1, status="rejected", epoch=12)
    topic = topics.Topic("res", NODE, told.id)
    Intake(registry, roster).take(topic, Received(str(topic), encode(told), is_retained=False), 0.0)
    assert registry.nodes()[0].epoch == 12


def test_a_retained_state_is_as_old_as_its_expiry_says(roster: Roster) -> None:
    roster.state_came(state(kind="full", left_s=71.0), 86_400 - 60, 1000.0)
    assert view(roster, 1000.0).lease == Lease("full", 1011.0, 1000.0)


def test_r9_a_retained_state_older_than_the_record_says_nothing(registry: Registry, roster: Roster) -> None:
    intake, topic = Intake(registry, roster), topics.Topic("state", NODE)
    for report in (state(2), state(1, kind="full", left_s=50.0)):
        intake.take(topic, Received(str(topic), encode(report), is_retained=True, expiry_left_s=86_400), 0.0)
    assert view(roster, 0.0).lease is None


def test_one_order_at_a_time_until_its_result_or_its_deadline(registry: Registry, roster: Roster) -> None:
    row = order(registry, roster, "activate", 50.0)
    assert view(roster, 50.0).retry_at_s == 80.0
    roster.ended(row, answer(row, "succeeded"), 52.0)
    assert view(roster, 52.0).retry_at_s == 52.0
    assert view(roster, 52.0).lease == Lease("full", 140.0, 52.0), "counted from the order, as the node does"


def test_the_result_of_an_overtaken_order_says_nothing(registry: Registry, roster: Roster) -> None:
    first, _second = order(registry, roster, "activate", 0.0), order(registry, roster, "standby", 1.0)
    roster.ended(first, answer(first, "succeeded"), 2.0)
    assert (view(roster, 2.0).lease, view(roster, 2.0).retry_at_s) == (None, 31.0)


def test_failures_are_answered_with_growing_patience(registry: Registry, roster: Roster) -> None:
    pauses = []
    for _ in range(8):
        row = order(registry, roster, "activate", 0.0)
        roster.ended(row, answer(row, "failed", "unhealthy"), 10.0)
        pauses.append(view(roster, 10.0).retry_at_s - 10.0)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    row = order(registry, roster, "activate", 0.0)
    roster.ended(row, answer(row, "succeeded"), 10.0)
    row = order(registry, roster, "renew", 20.0)
    roster.ended(row, answer(row, "rejected", "expired"), 21.0)
    assert (view(roster, 21.0).lease, view(roster, 21.0).retry_at_s) == (None, 22.0), "a renewal that fails makes room for a new lease"


def test_after_standing_down_a_node_is_left_to_report_its_mode(registry: Registry, roster: Roster) -> None:
    row = order(registry, roster, "standby", 0.0)
    roster.ended(row, answer(row, "succeeded"), 10.0)
    assert view(roster, 10.0).retry_at_s == 10.0 + SETTLE_S
    roster.state_came(state(2, mode="draining", epoch=1), 86_400, 11.0)
    assert view(roster, 11.0).retry_at_s == 10.0 + SETTLE_S
    roster.state_came(state(3, mode="standby", epoch=1), 86_400, 12.0)
    assert view(roster, 12.0).retry_at_s == 12.0


def test_only_nodes_that_can_be_reached_and_wish_traffic_are_backups(registry: Registry, roster: Roster) -> None:
    roster.listens(0.0)
    registry.store("state", state())
    there = Endpoint(host="10.0.0.7", port=8080)

    def meta(endpoint: Endpoint | None, weight: int = 1) -> Meta:
        return Meta(node=NODE, boot="b", agent="0", endpoint=endpoint, backup=Offer(weight=weight))

    found = []
    for told in (meta(None), meta(there), meta(there, 0), meta(there.model_copy(update={"tls": True})), meta(there, 5)):
        registry.store("meta", told)
        found.append([backup.weight for backup in roster.backups(1.0)])
    assert found == [[], [1], [], [], [5]]
    registry.set_silent(NODE, True)
    assert roster.backups(1.0) == []
