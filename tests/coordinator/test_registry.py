"""The record: what grows only, what is final, what counts once, what is let go."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from pydantic import JsonValue

from agent.protocol.messages import Command, Event, Heartbeat, Presence, Result, State
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import wire_now
from coordinator import registry as module
from coordinator.registry import MIGRATIONS, Registry


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "coordinator.sqlite"


@pytest.fixture
def registry(file: Path) -> Registry:
    opened = Registry(file)
    opened.store("state", state())
    return opened


def state(seq: int = 1, boot: str = "b", epoch: int = 0) -> State:
    return State(node="edge-a", boot=boot, seq=seq, mode="standby", epoch=epoch)


def command(op: str = "ping", node: str = "edge-a") -> Command:
    args: dict[str, JsonValue] = {"lease_s": 9.0} if op in ("activate", "renew") else {}
    return Command(id=new_ulid(), op=op, node=node, issued_at=wire_now(), deadline_s=30.0, issuer="c", args=args)


def result(of: Command, status: str, seq: int = 1, node: str = "edge-a") -> Result:
    return Result.model_validate({"id": of.id, "op": of.op, "node": node, "seq": seq, "status": status, "epoch": 0})


def event(name: str = "thermal") -> Event:
    return Event(id=new_ulid(), node="edge-a", event_class=name, severity="info", ts=wire_now(), mono=1.0)


def stored_seq(registry: Registry) -> int:
    row = registry.node("edge-a")
    assert row is not None and row.state is not None
    return row.state.seq


def test_r9_an_older_seq_changes_nothing_and_a_new_boot_begins_anew(registry: Registry) -> None:
    assert registry.store("state", state(5))
    assert not registry.store("state", state(5))
    assert not registry.store("state", state(4))
    assert stored_seq(registry) == 5
    assert registry.store("state", state(1, boot="c"))
    assert stored_seq(registry) == 1


def test_l1_an_epoch_is_raised_with_its_order_and_a_renewal_repeats_it(registry: Registry) -> None:
    epochs = [registry.issue(command(op), 0.0).command.epoch for op in ("activate", "renew", "standby", "ping", "drain")]
    assert epochs == [1, 1, 2, None, 3]


def test_l3_the_epoch_follows_what_the_node_says_and_never_goes_back(registry: Registry) -> None:
    registry.store("state", state(2, epoch=7))
    registry.store("state", state(3, epoch=4))
    registry.raise_epoch("edge-a", 3)
    assert registry.issue(command("standby"), 0.0).command.epoch == 8


def test_an_order_for_an_unknown_node_is_not_recorded(registry: Registry) -> None:
    with pytest.raises(KeyError):
        registry.issue(command(node="edge-z"), 0.0)
    assert registry.open_commands() == []


def test_what_was_recorded_is_there_after_a_restart(registry: Registry, file: Path) -> None:
    sent = registry.issue(command("drain"), 12.5)
    registry.set_silent("edge-a", True)
    before = registry.nodes()
    registry.close()
    again = Registry(file)
    assert again.nodes() == before
    assert (before[0].epoch, before[0].is_drained, before[0].is_silent) == (1, True, True)
    assert again.open_commands() == [sent]
    again.close()


def test_a_drain_lasts_until_the_next_order_about_the_lease(registry: Registry) -> None:
    drained = []
    for op in ("drain", "ping", "standby", "drain", "activate"):
        registry.issue(command(op), 0.0)
        drained.append(registry.nodes()[0].is_drained)
    assert drained == [True, True, False, True, False]


def test_r4_a_final_status_is_immutable_and_steps_come_in_order(registry: Registry) -> None:
    sent = registry.issue(command(), 0.0).command
    assert registry.store_result(result(sent, "executing", 2))
    assert not registry.store_result(result(sent, "accepted", 1))
    assert not registry.store_result(result(sent, "succeeded", 3, node="edge-b"))
    assert registry.store_result(result(sent, "succeeded", 3))
    assert not registry.store_result(result(sent, "failed", 4))
    assert not registry.store_result(result(command(), "succeeded"))
    row = registry.command(sent.id)
    assert row is not None and (row.status, row.is_final) == ("succeeded", True)
    registry.expire(sent.id)
    assert registry.command(sent.id) == row


def test_an_event_counts_once(registry: Registry) -> None:
    told = event()
    assert registry.add_event(told)
    assert not registry.add_event(told)
    assert [number for number, _ in registry.events()] == [1]


def test_events_are_read_from_a_number_on_or_the_newest(registry: Registry) -> None:
    for name in "abcde":
        registry.add_event(event(name))
    assert [told["class"] for _, told in registry.events(limit=2)] == ["d", "e"]
    assert [told["class"] for _, told in registry.events(after=2, limit=2)] == ["c", "d"]
    assert registry.events(after=5) == []
    assert [told["class"] for _, told in registry.events(before=5, limit=2)] == ["c", "d"]
    assert registry.events(after=2, before=4)[0][0] == 3 and len(registry.events(after=2, before=4)) == 1
    assert registry.last_event() == 5


def test_old_events_and_final_commands_are_let_go_and_open_ones_are_not(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVENTS_KEPT", 3)
    monkeypatch.setattr(module, "COMMANDS_KEPT", 3)
    left_open = registry.issue(command(), 0.0)
    for name in "abcdef":
        registry.add_event(event(name))
        registry.store_result(result(registry.issue(command(), 0.0).command, "succeeded"))
    registry.issue(command(), 0.0)
    assert [told["class"] for _, told in registry.events()] == ["d", "e", "f"]
    assert len(registry.commands("edge-a")) == 4
    assert left_open in registry.open_commands()


def test_a_forgotten_node_takes_its_open_orders_along(registry: Registry) -> None:
    registry.issue(command(), 0.0)
    assert registry.forget("edge-a")
    assert registry.open_commands() == [] and registry.node("edge-a") is None
    assert not registry.forget("edge-a")


def test_each_start_has_a_higher_term(registry: Registry, file: Path) -> None:
    assert [registry.next_term(), registry.next_term(), registry.next_term(above=9)] == [1, 2, 10]
    registry.close()
    assert Registry(file).next_term() == 11


def test_a_record_of_the_first_schema_is_taken_over_and_one_of_the_future_is_refused(file: Path) -> None:
    old = sqlite3.connect(file)
    old.executescript(MIGRATIONS[0])
    old.execute("INSERT INTO nodes (node, epoch) VALUES ('edge-a', 41)")
    old.commit()
    opened = Registry(file)
    assert opened.nodes()[0].epoch == 41
    opened.close()
    old.execute("PRAGMA user_version = 99")
    old.close()
    with pytest.raises(sqlite3.DatabaseError, match="schema 99"):
        Registry(file)


def test_a_stored_report_of_another_version_is_ignored(registry: Registry, file: Path) -> None:
    registry._database.execute("UPDATE nodes SET state = '{\"v\": 2}', epoch = 6")
    registry.close()
    row = Registry(file).nodes()[0]
    assert (row.state, row.epoch) == (None, 6)


def test_a_failed_write_leaves_record_and_memory_as_they_were(registry: Registry) -> None:
    registry._database.execute("PRAGMA query_only = ON")
    for attempt in (lambda: registry.store("state", state(9)), lambda: registry.issue(command("drain"), 0.0), registry.check):
        with pytest.raises(sqlite3.OperationalError):
            attempt()
    assert stored_seq(registry) == 1 and registry.nodes()[0].epoch == 0
    registry._database.execute("PRAGMA query_only = OFF")
    registry.check()


def test_heartbeats_and_presence_are_columns_of_their_own(registry: Registry) -> None:
    beat = Heartbeat(node="edge-a", boot="b", sess=1, seq=4, ts=wire_now(), mono=1.0, mode="active", epoch=3)
    birth = Presence(node="edge-a", boot="b", sess=1, state="online", reason="birth", mode="active", epoch=2, ts=wire_now())
    assert registry.store("heartbeat", beat) and registry.store("presence", birth)
    row = registry.nodes()[0]
    assert (row.heartbeat, row.presence, row.epoch) == (beat, birth, 3)
