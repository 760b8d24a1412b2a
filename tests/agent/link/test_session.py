"""The session against a real mosquitto; tests are named after the rules of the protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.link.backoff import BackoffPolicy
from agent.link.broker import Broker, LinkLost
from agent.link.mqtt import Link
from agent.link.session import Uplink
from agent.protocol import topics
from agent.protocol.messages import CoordinatorPresence, Desired, Heartbeat, Meta, Presence, Resync, State, Sync
from agent.protocol.wire import encode, wire_now
from tests.agent.link.broker import Mosquitto, running_mosquitto
from tests.agent.link.node import NODE, QUICK, cut, running_node, until
from tests.agent.link.watcher import command, watching

pytestmark = pytest.mark.anyio


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path / "broker") as broker:
        yield broker


async def test_r1_a_death_carries_boot_and_session_of_its_birth(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher:
        async with running_node(mosquitto.host, mosquitto.port, tmp_path) as node:
            birth = await watcher.presence(lambda said: said.state == "online")
            await cut(node)
            will = await watcher.presence(lambda said: said.reason == "will")
            again = await watcher.presence(lambda said: said.state == "online" and said.sess > birth.sess)
        stop = await watcher.presence(lambda said: said.reason == "shutdown")
    assert (will.boot, will.sess, will.state) == (birth.boot, birth.sess, "offline")
    assert (stop.boot, stop.sess, stop.state) == (again.boot, again.sess, "offline")
    assert all(said.reason != "will" or said.sess != again.sess for said in watcher.all("presence", Presence))


async def test_r2_the_session_counter_survives_a_restart(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher:
        seen: list[Presence] = []
        for _ in range(3):
            async with running_node(mosquitto.host, mosquitto.port, tmp_path):
                last = seen[-1].sess if seen else 0
                seen.append(await watcher.presence(lambda said, last=last: said.state == "online" and said.sess > last))  # type: ignore[misc]  # bound early
    assert [said.sess for said in seen] == [1, 2, 3]
    assert len({said.boot for said in seen}) == 1


async def test_r3_a_retained_command_is_dropped_and_reported(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher:
        order = command("model.deploy", {"name": "tiny"})
        await watcher.send(order, retain=True)
        async with running_node(mosquitto.host, mosquitto.port, tmp_path) as node:
            fault = await watcher.event("protocol")
            ping = await watcher.order("ping")
            await watcher.final(ping)
            assert node.started == []
        assert "retained" in str(fault.data["reason"])
        assert watcher.results(order.id) == []


async def test_the_introduction_is_repeated_after_every_connack(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher, running_node(mosquitto.host, mosquitto.port, tmp_path) as node:
        await watcher.event("sync")
        kinds = [topics.parse(message.topic).kind for message in watcher.heard if topics.parse(message.topic).kind != "hb"]
        assert kinds == ["presence", "meta", "state", "evt"]
        meta, state = watcher.all("meta", Meta)[0], watcher.all("state", State)[0]
        assert meta.hash and meta.boot == node.journal.boot and "activate" in meta.ops and "ping" in meta.ops
        assert state.mode == "standby"
        done = await watcher.order("ping")
        await watcher.final(done)
        await cut(node)
        sync = await watcher.event("sync", skip=1)
        body = Sync.model_validate(sync.data, strict=False)
        assert body.last_cmd_ids == (done,) and body.journal_open == ()


async def test_a_resync_brings_meta_and_state_again(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher, running_node(mosquitto.host, mosquitto.port, tmp_path):
        await watcher.event("sync")
        await watcher.link.publish(topics.coordinator_resync(), encode(Resync(spread_s=0.1)))
        await watcher.event("sync", skip=1)
        assert len(watcher.all("meta", Meta)) == 2


async def test_a_restarted_broker_without_memory_hears_everything_again(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with running_node(mosquitto.host, mosquitto.port, tmp_path) as node:
        async with watching(mosquitto.host, mosquitto.port) as watcher:
            first = await watcher.presence(lambda said: said.state == "online")
        mosquitto.stop(kill=True)
        await node.events.publish("thermal", "warning", {"gpu": 91})
        mosquitto.start()
        async with watching(mosquitto.host, mosquitto.port) as watcher:
            again = await watcher.presence(lambda said: said.state == "online" and said.sess > first.sess)
            await watcher.until(lambda: next(iter(watcher.all("meta", Meta)), None))
            event = await watcher.event("thermal")
    assert again.boot == first.boot
    assert event.data == {"gpu": 91}


async def test_r9_sequence_numbers_grow_over_restarts(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher:
        last = 0
        for _ in range(2):
            watcher.heard.clear()
            async with running_node(mosquitto.host, mosquitto.port, tmp_path):
                await watcher.until(lambda: next(iter(watcher.all("hb", Heartbeat)[2:]), None))
            seqs = [said.seq for said in watcher.all("state", State)] + [said.seq for said in watcher.all("hb", Heartbeat)]
            assert len(set(seqs)) == len(seqs) and min(seqs) > last
            last = max(seqs)


async def test_the_coordinator_and_the_desired_document_are_heard(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher:
        here = CoordinatorPresence(coordinator="coord-a", term=7, online=True, ts=wire_now())
        await watcher.link.publish(topics.coordinator_presence(), encode(here), retain=True)
        await watcher.link.publish(topics.desired(NODE), encode(Desired(rev=9)), retain=True)
        async with running_node(mosquitto.host, mosquitto.port, tmp_path) as node:
            await until(lambda: Uplink(True, True, 7) in node.uplinks and node.desired)
            late = CoordinatorPresence(coordinator="coord-b", term=6, online=False, ts=wire_now())
            await watcher.link.publish(topics.coordinator_presence(), encode(late), retain=True)
            await watcher.final(await watcher.order("ping"))
            assert node.uplinks[-1].coordinator_is_online  # the will of an earlier term says nothing about this one
            assert node.desired[-1].rev == 9


async def test_garbage_is_reported_and_does_not_stop_the_node(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher, running_node(mosquitto.host, mosquitto.port, tmp_path):
        await watcher.event("sync")
        for payload in (b"", b"\xff\xfe", b"[" * 50_000, b'{"v":1}', b'{"v":2,"rev":1}'):
            await watcher.link.publish(topics.desired(NODE), payload)
            await watcher.link.publish(topics.command(NODE, "ping"), payload)
        fault = await watcher.event("protocol")
        assert fault.severity == "warning"
        assert (await watcher.final(await watcher.order("ping", {"echo": "x"}))).output == {"echo": "x"}


async def test_data_goes_to_its_own_root(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher, running_node(mosquitto.host, mosquitto.port, tmp_path) as node:
        await watcher.event("sync")
        await watcher.link.subscribe(["hotspare-data/v1/+/+"])
        await node.session.publish_data("cam0", b"now")
        await until(lambda: [m.payload for m in watcher.heard if m.topic == f"hotspare-data/v1/{NODE}/cam0"] == [b"now"])


async def test_a_client_id_taken_over_is_reported_and_slows_down(mosquitto: Mosquitto, tmp_path: Path) -> None:
    settings = replace(QUICK, backoff=BackoffPolicy(base_s=0.01, cap_s=0.02, takeover_cap_s=0.02, young_s=60.0))
    async with (
        watching(mosquitto.host, mosquitto.port) as watcher,
        running_node(mosquitto.host, mosquitto.port, tmp_path, settings=settings) as node,
    ):
        for _ in range(3):
            await until(lambda: node.session._link is not None)
            taken = node.session._who.sess
            async with Link(Broker(mosquitto.host, mosquitto.port, NODE)):
                await until(lambda taken=taken: node.session._who.sess > taken)  # type: ignore[misc]  # bound early
        event = await watcher.event("session")
        assert event.data["count"] == 3


async def test_nobody_there_raises_in_the_caller(mosquitto: Mosquitto) -> None:
    mosquitto.stop()
    with pytest.raises(LinkLost, match="no connection"):
        async with Link(Broker(mosquitto.host, mosquitto.port, NODE)):
            pass
