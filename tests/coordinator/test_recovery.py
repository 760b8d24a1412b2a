"""Restarts, restored records, lost brokers, rivals and rubbish: the coordinator goes on, and no order is given twice."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from agent.link.broker import Broker, LinkLost
from agent.link.mqtt import Link
from agent.protocol import topics
from agent.protocol.messages import Command, CoordinatorPresence, Event, Presence, Result, State
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import Wire, decode, encode, wire_now
from coordinator.registry import Registry
from tests.agent.link.broker import Mosquitto, running_mosquitto
from tests.coordinator.fleet import coordinator_settings, fleet_node, running_coordinator, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path / "broker") as started:
        yield started


@asynccontextmanager
async def speaker(broker: Mosquitto, name: str = "edge-b", listens_to: tuple[str, ...] = ()) -> AsyncIterator[tuple[Link, list[bytes]]]:
    """A bare connection, for saying what no node of ours would say."""
    heard: list[bytes] = []
    async with Link(Broker(broker.host, broker.port, name, session_expiry_s=0)) as link, anyio.create_task_group() as tasks:

        async def listen() -> None:
            try:
                async for message in link.messages():
                    link.acknowledge(message)
                    heard.append(message.payload)
            except LinkLost:
                return

        if listens_to:
            await link.subscribe(listens_to)
        tasks.start_soon(listen)
        yield link, heard
        tasks.cancel_scope.cancel()


def birth(node: str = "edge-b", epoch: int = 0, sess: int = 1) -> Presence:
    return Presence(node=node, boot="b", sess=sess, state="online", reason="birth", mode="standby", epoch=epoch, ts=wire_now())


async def say(link: Link, topic: str, message: Wire | bytes, retain: bool = False) -> None:
    await link.publish(topic, message if isinstance(message, bytes) else encode(message), retain=retain)


async def test_a_restart_goes_on_with_the_same_epochs_and_activates_nobody_twice(broker: Mosquitto, tmp_path: Path) -> None:
    settings = coordinator_settings(broker, tmp_path, lease_s=2.0, renew_s=0.5)
    async with fleet_node(broker, tmp_path / "node") as node:
        async with running_coordinator(settings) as coordinator:
            await until(lambda: node.mode == "active")
            assert (coordinator.control.term, coordinator.epoch()) == (1, 1)
        async with running_coordinator(settings) as coordinator:
            await until(lambda: coordinator.statuses("renew").count("succeeded") >= 2)
            assert (coordinator.control.term, coordinator.epoch()) == (2, 1)
            assert coordinator.statuses("activate") == ["succeeded"]
            assert (node.mode, node.standby.lease.epoch) == ("active", 1)


async def test_c1_an_order_that_a_dead_coordinator_left_open_is_sent_again_under_its_id(broker: Mosquitto, tmp_path: Path) -> None:
    settings = coordinator_settings(broker, tmp_path)
    registry = Registry(settings.database)
    registry.store("presence", birth("edge-a"))
    draft = Command(
        id=new_ulid(), op="activate", node="edge-a", issued_at=wire_now(), deadline_s=10.0, issuer="coord-a", args={"lease_s": 60.0}
    )
    left = registry.issue(draft, wire_now().timestamp())
    registry.issue(draft.model_copy(update={"id": new_ulid(), "op": "ping", "args": {}}), wire_now().timestamp() - 60.0)
    registry.close()
    async with running_coordinator(settings) as coordinator, fleet_node(broker, tmp_path / "node") as node:
        await until(lambda: node.mode == "active" and coordinator.statuses("activate") == ["succeeded"])
        assert node.standby.lease.last_id == left.command.id
        assert coordinator.epoch() == 1, "the open order was waited for, not given anew"
        await until(lambda: coordinator.statuses("ping") == ["expired"])


async def test_c1_a_node_that_syncs_gets_what_is_open_again_under_the_same_id(broker: Mosquitto, tmp_path: Path) -> None:
    commands = (topics.command("edge-b", "ping"),)
    async with (
        running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator,
        speaker(broker, "edge-b", commands) as (link, heard),
    ):
        await say(link, topics.presence("edge-b"), birth())
        await until(lambda: coordinator.is_online("edge-b"))
        sent, is_sent = await coordinator.control.orders.send("edge-b", "ping", {}, 5.0)
        assert is_sent
        sync = Event(id=new_ulid(), node="edge-b", event_class="sync", severity="info", ts=wire_now(), mono=1.0)
        for _ in range(2):  # delivered twice, counted once
            await say(link, topics.event("edge-b", "sync"), sync)
        await until(lambda: len(heard) >= 2)
        await say(link, topics.result("edge-b", sent.id), result(sent, "succeeded"))
        await until(lambda: coordinator.statuses("ping", "edge-b") == ["succeeded"])
        assert [decode(Command, payload).id for payload in heard] == [sent.id] * 2
        await say(link, topics.event("edge-b", "sync"), sync.model_copy(update={"id": new_ulid()}))
        await until(lambda: len(coordinator.registry.events()) == 2)
        assert len(heard) == 2, "what is final is not sent again"


def result(command: Command, status: str, seq: int = 1, node: str = "edge-b", epoch: int = 0) -> Result:
    return Result.model_validate({"id": command.id, "op": command.op, "node": node, "seq": seq, "status": status, "epoch": epoch})


async def test_l3_a_record_restored_from_an_older_copy_catches_up(broker: Mosquitto, tmp_path: Path) -> None:
    settings = coordinator_settings(broker, tmp_path)
    async with fleet_node(broker, tmp_path / "node") as node:
        async with running_coordinator(settings) as coordinator:
            await until(lambda: node.mode == "active")
            copy = tmp_path / "copy.sqlite"
            with sqlite3.connect(settings.database) as source, sqlite3.connect(copy) as target:
                source.backup(target)
            target.close()
            source.close()
        async with running_coordinator(settings) as coordinator:  # a life that the copy knows nothing of
            before = node.standby.lease.epoch
            await coordinator.control.orders.send("edge-a", "standby", {}, 5.0)
            await until(lambda: node.mode == "active" and node.standby.lease.epoch == before + 2)
        reached = node.standby.lease.epoch
        assert reached == 3
        for tail in ("-wal", "-shm"):
            settings.database.with_name(settings.database.name + tail).unlink(missing_ok=True)
        shutil.copy(copy, settings.database)
        async with running_coordinator(settings) as coordinator:
            await until(lambda: coordinator.epoch() >= reached and coordinator.statuses("renew").count("succeeded") >= 1)
            assert coordinator.control.term == 2
            await coordinator.control.orders.send("edge-a", "standby", {}, 5.0)
            await until(lambda: node.mode == "active" and node.standby.lease.epoch >= reached + 2)


async def test_a_lost_broker_changes_nothing_and_its_return_brings_all_back(tmp_path: Path) -> None:
    with running_mosquitto(tmp_path / "broker") as broker:
        settings = coordinator_settings(broker, tmp_path)
        async with running_coordinator(settings) as coordinator, fleet_node(broker, tmp_path / "node") as node:
            await until(lambda: node.mode == "active" and "8443" in coordinator.backups())
            broker.stop(kill=True)
            await until(lambda: not coordinator.control.is_connected)
            sent, is_sent = await coordinator.control.orders.send("edge-a", "ping", {"echo": "still there?"}, 10.0)
            assert not is_sent
            await until(lambda: not coordinator.is_online())
            assert "8443" in coordinator.backups(), "a coordinator that hears nobody takes nobody out of the balancer"
            broker.start()  # without any memory
            await until(lambda: coordinator.statuses("ping") == ["succeeded"])
            assert coordinator.registry.command(sent.id) is not None
            await until(coordinator.is_online)
            assert "8443" in coordinator.backups()


async def test_rubbish_and_foreign_payloads_are_dropped_and_the_listener_goes_on(broker: Mosquitto, tmp_path: Path) -> None:
    async with running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator, speaker(broker) as (link, _):
        await say(link, topics.presence("edge-c"), birth("edge-b"))
        await say(link, topics.presence("edge-b"), b"\xff\x00{", retain=True)
        await say(link, "hotspare/v1/edge-b/meta", b"[" * 100_000)
        await say(link, "hotspare/v1/edge-b/state", b'{"v": 1, "node": "edge-b"}')
        await say(link, "hotspare/v1/Bad Name/presence", encode(birth()))
        await say(link, topics.event("edge-b", "thermal"), event_of_class("other"))
        huge = State(node="edge-b", boot="b", seq=1, mode="standby", epoch=(1 << 63) - 1)
        await say(link, topics.state("edge-b"), huge)  # the next epoch would not fit: this node cannot be ordered, all others can
        await say(link, topics.presence("edge-b"), birth())
        await until(lambda: coordinator.is_online("edge-b"))
        assert coordinator.control.problems.faults == 6
        assert coordinator.registry.node("edge-c") is None
        with pytest.raises(OverflowError):
            await coordinator.control.orders.send("edge-b", "standby", {}, 5.0)
        async with fleet_node(broker, tmp_path / "node") as node:
            await until(lambda: node.mode == "active")


def event_of_class(name: str) -> Event:
    return Event(id=new_ulid(), node="edge-b", event_class=name, severity="info", ts=wire_now(), mono=1.0)


async def test_a_result_counts_only_from_the_node_that_was_ordered(broker: Mosquitto, tmp_path: Path) -> None:
    async with running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator, speaker(broker) as (link, _):
        for node in ("edge-b", "edge-c"):
            await say(link, topics.presence(node), birth(node))
        await until(lambda: coordinator.is_online("edge-c"))
        sent, _ = await coordinator.control.orders.send("edge-b", "ping", {}, 5.0)
        await say(link, topics.result("edge-c", sent.id), result(sent, "succeeded", node="edge-c"))
        await say(link, topics.result("edge-b", sent.id), result(sent, "failed"))
        await until(lambda: coordinator.statuses("ping", "edge-b") == ["failed"])


async def test_an_unanswered_order_expires_and_a_late_result_still_counts(broker: Mosquitto, tmp_path: Path) -> None:
    async with running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator, speaker(broker) as (link, _):
        await say(link, topics.presence("edge-b"), birth())
        await until(lambda: coordinator.is_online("edge-b"))
        ping = Command(id=new_ulid(), op="ping", node="edge-b", issued_at=wire_now(), deadline_s=10.0, issuer="coord-a")
        sent = coordinator.registry.issue(ping, wire_now().timestamp() - 16.0).command
        await until(lambda: coordinator.statuses("ping", "edge-b") == ["expired"])
        await say(link, topics.result("edge-b", sent.id), result(sent, "timed_out"))
        await until(lambda: coordinator.statuses("ping", "edge-b") == ["timed_out"])
        await say(link, topics.result("edge-b", sent.id), result(sent, "succeeded", seq=9))
        await say(link, topics.presence("edge-b"), birth(sess=2))
        await until(lambda: coordinator.registry.node("edge-b").presence.sess == 2)  # type: ignore[union-attr]  # it has one
        assert coordinator.statuses("ping", "edge-b") == ["timed_out"], "r4: a final status is immutable"


async def test_r1_the_late_will_of_an_earlier_session_is_no_death(broker: Mosquitto, tmp_path: Path) -> None:
    async with running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator, speaker(broker) as (link, _):
        await say(link, topics.presence("edge-b"), birth(sess=2))
        for sess in (1, 2):
            will = birth(sess=sess).model_copy(update={"state": "offline", "reason": "will"})
            await say(link, topics.presence("edge-b"), will)
            await say(link, topics.event("edge-b", "mark"), event_of_class("mark"))
            await until(lambda sess=sess: len(coordinator.registry.events()) == sess)  # type: ignore[misc]  # bound early
            assert coordinator.control.presence_of("edge-b") == ("online" if sess == 1 else "will")


async def test_its_own_presence_is_repaired_and_a_higher_term_is_outdone_or_respected(broker: Mosquitto, tmp_path: Path) -> None:
    topic = topics.coordinator_presence()

    def claim(name: str, term: int, online: bool) -> CoordinatorPresence:
        return CoordinatorPresence(coordinator=name, term=term, online=online, ts=wire_now())

    async with running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator, speaker(broker, "op", (topic,)) as (link, heard):

        def last() -> tuple[str, int, bool]:
            seen = decode(CoordinatorPresence, heard[-1]) if heard and heard[-1] else None
            return (seen.coordinator, seen.term, seen.online) if seen else ("", 0, False)

        for tampered in (claim("coord-a", 1, online=False), claim("someone", 0, online=True), b"", b"rubbish"):
            heard.clear()
            await say(link, topic, tampered, retain=True)
            await until(lambda: len(heard) >= 2 and heard[-1] != b"rubbish" and last() == ("coord-a", 1, True))
        await say(link, topic, claim("coord-a", 7, online=True), retain=True)
        await until(lambda: last() == ("coord-a", 8, True))
        assert coordinator.control.term == 8

        await say(link, topic, claim("coord-b", 9, online=True), retain=True)
        await until(lambda: coordinator.control.orders.rival is not None)
        async with fleet_node(broker, tmp_path / "node") as node:
            await until(coordinator.is_online)
            with anyio.move_on_after(0.4):
                await until(lambda: coordinator.statuses("activate"))
                raise AssertionError("ordered beside another acting coordinator")
            await say(link, topic, claim("coord-b", 9, online=False), retain=True)
            await until(lambda: last() == ("coord-a", 10, True))
            await until(lambda: node.mode == "active")


async def test_a_record_that_takes_no_writes_hangs_up(broker: Mosquitto, tmp_path: Path) -> None:
    async with running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator, fleet_node(broker, tmp_path / "node") as node:
        await until(lambda: node.mode == "active")
        coordinator.registry._database.execute("PRAGMA query_only = ON")
        await until(lambda: not coordinator.control.is_connected)
        assert "readonly" in coordinator.control.problems.open["connection"]
        coordinator.registry._database.execute("PRAGMA query_only = OFF")
        await until(lambda: coordinator.control.is_connected and node.mode == "active")


async def test_a_forgotten_node_leaves_nothing_at_the_broker(broker: Mosquitto, tmp_path: Path) -> None:
    async with running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator:
        async with fleet_node(broker, tmp_path / "node"):
            await until(coordinator.is_online)
        await until(lambda: coordinator.control.presence_of("edge-a") == "shutdown")
        assert await coordinator.control.forget("edge-a")
        assert not await coordinator.control.forget("edge-a")
        async with speaker(broker, "op", topics.COORDINATOR_SUBSCRIPTIONS) as (_, heard):
            await until(lambda: heard)
            assert [decode(CoordinatorPresence, payload).coordinator for payload in heard] == ["coord-a"]
        assert coordinator.registry.node("edge-a") is None
        assert coordinator.control.problems.faults == 0


async def test_the_events_of_a_node_are_kept_with_their_data(broker: Mosquitto, tmp_path: Path) -> None:
    async with running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator, fleet_node(broker, tmp_path / "node") as node:
        await node.session._events.publish("thermal", "warning", {"zone": "gpu", "temp_c": 91.5})
        await until(lambda: any(event["class"] == "thermal" for _, event in coordinator.registry.events()))
        told = next(event for _, event in coordinator.registry.events() if event["class"] == "thermal")
        assert json.dumps(told["data"]) == '{"zone": "gpu", "temp_c": 91.5}'
