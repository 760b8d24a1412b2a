"""Journal, outbox and back-off on their own: bounds, restarts, broken files, full disks."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from agent.link import journal as journals
from agent.link.backoff import Backoff, BackoffPolicy, after_failure, after_session, delay_s, is_contested
from agent.link.journal import Journal
from agent.link.outbox import Keep, Outbox
from agent.mode import Autonomy
from agent.protocol.lease import LeaseState
from agent.protocol.messages import Command, Result
from agent.protocol.ulid import encode as ulid_of
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import Status, wire_now


def command(command_id: str | None = None) -> Command:
    return Command(id=command_id or new_ulid(), op="ping", node="abc", issued_at=wire_now(), deadline_s=30, issuer="c")


def result(order: Command, seq: int, status: Status) -> Result:
    return Result(id=order.id, op=order.op, node="abc", seq=seq, status=status, epoch=0)


def test_r4_a_final_status_is_immutable(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", "boot-1") as journal:
        order = command()
        journal.receive(order, result(order, 1, "accepted"), 0.0, 0.0)
        assert journal.step(result(order, 3, "succeeded"))
        assert not journal.step(result(order, 4, "failed"))
        assert journal.last_result(order.id) == result(order, 3, "succeeded")


def test_results_stay_unsent_until_the_broker_has_the_last_one(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", "boot-1") as journal:
        order = command()
        journal.receive(order, result(order, 1, "accepted"), 0.0, 0.0)
        journal.sent(result(order, 1, "accepted"))
        assert journal.unsent() == []
        journal.step(result(order, 2, "succeeded"))
        journal.sent(result(order, 1, "accepted"))
    with Journal(tmp_path / "j", "boot-1") as journal:
        assert journal.unsent() == [result(order, 2, "succeeded")]
        journal.sent(result(order, 2, "succeeded"))
        assert journal.unsent() == []


def test_r7_an_open_entry_knows_its_age_within_one_boot_only(tmp_path: Path) -> None:
    order = command()
    with Journal(tmp_path / "j", "boot-1") as journal:
        journal.receive(order, result(order, 1, "accepted"), 100.0, 5.0)
    with Journal(tmp_path / "j", "boot-1") as journal:
        assert [(entry.command.id, entry.elapsed_s) for entry in journal.open_entries(110.0)] == [(order.id, 15.0)]
    with Journal(tmp_path / "j", "boot-2") as journal:
        assert [(entry.command.id, entry.elapsed_s) for entry in journal.open_entries(1.0)] == [(order.id, None)]


def test_l2_the_epoch_is_stored_in_the_commit_of_its_command(tmp_path: Path) -> None:
    order = command()
    with Journal(tmp_path / "j", "boot-1") as journal:
        journal.receive(order, result(order, 1, "accepted"), 0.0, 0.0, LeaseState(7, order.id, "full", 90.0))
        with pytest.raises(sqlite3.IntegrityError):
            journal.receive(order, result(order, 1, "accepted"), 0.0, 0.0, LeaseState(8, order.id))
        assert journal.load_lease() == LeaseState(7, order.id, "full", 90.0)


def test_counters_facts_and_boot_survive_and_a_wiped_store_is_a_new_boot(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", "boot-1") as journal:
        first = journal.boot
        assert [journal.next_session(), journal.next_session(), journal.reserve(1000), journal.reserve(1000)] == [1, 2, 1, 1001]
        journal.save_autonomy(Autonomy(3, 12.5))
    with Journal(tmp_path / "j", "boot-1") as journal:
        assert (journal.boot, journal.next_session(), journal.load_autonomy()) == (first, 3, Autonomy(3, 12.5))
    with Journal(tmp_path / "j", "boot-2") as journal:
        assert journal.boot != first
    with Journal(tmp_path / "other", "boot-1") as journal:
        assert journal.boot != first


def test_old_and_surplus_commands_are_forgotten_but_never_open_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "KEPT_COMMANDS", 50)
    monkeypatch.setattr(journals, "PRUNE_EVERY", 10)
    now_ms, week_ms = 2_000_000_000_000, 7 * 86_400_000
    ancient, open_one = command(ulid_of((now_ms - week_ms - 1000) << 80)), command(ulid_of((now_ms - week_ms - 1) << 80))
    with Journal(tmp_path / "j", "boot-1") as journal:
        journal._connection.execute("PRAGMA synchronous=OFF")
        journal.receive(ancient, result(ancient, 1, "rejected"), 0.0, 0.0)
        journal.sent(result(ancient, 1, "rejected"))
        journal.receive(open_one, result(open_one, 1, "accepted"), 0.0, 0.0)
        orders = [command(ulid_of(now_ms << 80 | number)) for number in range(120)]
        for order in orders:
            journal.receive(order, result(order, 1, "rejected"), 0.0, 0.0)
        assert journal.last_result(ancient.id) is None
        assert journal.open_ids() == (open_one.id,)
        assert journal.last_result(orders[-50].id) is not None
        assert journal.last_result(orders[0].id) is None


def test_c9_a_broken_file_is_set_aside_and_the_node_starts(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"not a database, but long enough to be read as the header of one" * 100)
    with Journal(tmp_path / "j", "boot-1") as journal:
        assert journal.next_session() == 1
    assert (tmp_path / "j.broken").exists()


def test_a_full_disk_leaves_the_journal_usable(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", "boot-1") as journal:
        pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
        journal._connection.execute(f"PRAGMA max_page_count={pages + 1}")
        order = command()
        large = result(order, 1, "accepted").model_copy(update={"output": {"x": "y" * 50_000}})
        with pytest.raises(sqlite3.OperationalError, match="full"):
            journal.receive(order, large, 0.0, 0.0)
        assert journal.last_result(order.id) is None
        journal._connection.execute("PRAGMA max_page_count=100000")
        journal.receive(order, large, 0.0, 0.0)


def test_c6_the_outbox_survives_a_restart_in_order(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o", "boot-1") as outbox:
        for number in range(3):
            outbox.put("event", "t", json.dumps(number).encode(), 10.0)
    with Outbox(tmp_path / "o", "boot-1") as outbox:
        waiting = outbox.oldest(20.0)
        assert [json.loads(message.payload) for message in waiting] == [0, 1, 2]
        assert waiting[0].expiry_s == 86_400 - 10
        outbox.done(waiting[0])
        assert (outbox.level(25.0).count, outbox.level(25.0).oldest_s) == (2, 15.0)


def test_the_outbox_drops_by_count_size_and_age_and_counts_by_class(tmp_path: Path) -> None:
    keeps = {"alarm": Keep(100, 10, 10_000), "event": Keep(100, 3, 10_000), "data": Keep(5, 100, 1000)}
    with Outbox(tmp_path / "o", "boot-1", keeps) as outbox:  # type: ignore[arg-type]  # its keys are the classes
        outbox.put("alarm", "t", b"a", 0.0)
        for number in range(5):
            outbox.put("event", "t", bytes([number]), 1.0)
            outbox.put("data", "t", bytes(400), 1.0)
        assert outbox.level(2.0).dropped == {"event": 2, "data": 3}
        assert [message.payload for message in outbox.oldest(7.0)] == [b"a", b"\x02", b"\x03", b"\x04"]
        assert outbox.level(7.0).dropped == {"event": 2, "data": 5}
        outbox.put("data", "t", bytes(400), 7.0)
        assert outbox.level(7.0).count == 5


def test_what_an_earlier_boot_left_is_kept_for_its_age_is_unknown(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o", "boot-1") as outbox:
        outbox.put("event", "t", b"x", 900_000.0)
    with Outbox(tmp_path / "o", "boot-2") as outbox:
        assert [message.payload for message in outbox.oldest(1.0)] == [b"x"]


def test_backoff_is_full_jitter_with_a_cap_and_slower_when_contested() -> None:
    policy, state = BackoffPolicy(), Backoff()
    bounds = []
    for _ in range(10):
        state = after_failure(state)
        bounds.append(delay_s(state, policy, 0.999_999))
    assert bounds[0] < 2.0 < bounds[1] < 4.0 and max(bounds) <= 60.0 and delay_s(state, policy, 0.0) == 0.0
    assert after_session(state, 5.0, policy) == Backoff()
    for _ in range(3):
        state = after_session(state, 1.0, policy)
    assert is_contested(state, policy) and 60.0 < delay_s(state, policy, 0.999_999) <= 300.0
