"""The life of a command over a real broker, and over SIGKILL at every edge of the journal."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from agent.link.commands import age_of
from agent.protocol import topics
from agent.protocol.messages import Command
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import FINAL_STATUSES, encode, wire_now
from tests.agent.link.broker import Mosquitto, running_mosquitto
from tests.agent.link.node import NODE, Node, running_node, until
from tests.agent.link.watcher import Watcher, command, watching

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[3]


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path / "broker") as broker:
        yield broker


@contextmanager
def node_process(broker: Mosquitto, folder: Path, die: str = "") -> Iterator[subprocess.Popen[bytes]]:
    arguments = [sys.executable, "-m", "tests.agent.link.node", "--port", str(broker.port), "--folder", str(folder), "--die", die]
    with (folder / "node.log").open("ab") as log, subprocess.Popen(arguments, cwd=ROOT, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            process.kill()


@asynccontextmanager
async def pair(broker: Mosquitto, folder: Path) -> AsyncIterator[tuple[Watcher, Node]]:
    """A watcher and a node that is there to be commanded."""
    async with watching(broker.host, broker.port) as watcher, running_node(broker.host, broker.port, folder) as node:
        await watcher.event("sync")
        yield watcher, node


async def killed(process: subprocess.Popen[bytes]) -> None:
    await until(lambda: process.poll() is not None)


def finals(watcher: Watcher, command_id: str) -> set[int]:
    """Sequence numbers of the final results: a second number would be a second ending."""
    return {result.seq for result in watcher.results(command_id) if result.status in FINAL_STATUSES and not result.replayed}


async def test_r4_a_command_is_accepted_executed_and_ended_once(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with pair(mosquitto, tmp_path) as (watcher, node):
        order = await watcher.order("model.deploy", {"name": "tiny"})
        await watcher.final(order)
        assert [(r.seq, r.status) for r in watcher.results(order)] == [(1, "accepted"), (2, "executing"), (3, "succeeded")]
        failed = await watcher.final(await watcher.order("pipeline.start", {"id": "cam0"}))
        assert failed.error is not None and (failed.status, failed.error.code) == ("failed", "no_space")
        assert node.journal.open_ids() == () and node.started == ["tiny"]


async def test_renewals_do_not_flood_the_log(mosquitto: Mosquitto, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "agent.link.commands")
    async with pair(mosquitto, tmp_path) as (watcher, _):
        for op, args in (("ping", {}), ("model.deploy", {"name": "tiny"})):
            await watcher.final(await watcher.order(op, args))
    told = [record.getMessage() for record in caplog.records]
    assert not any("(ping)" in line for line in told)
    assert any("(model.deploy): succeeded" in line for line in told)


async def test_r4_what_cannot_be_done_is_rejected_without_a_beginning(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with pair(mosquitto, tmp_path) as (watcher, _):
        cases = {
            "unsupported": await watcher.order("config.set", {"values": {}}),
            "invalid": await watcher.order("model.deploy", {"name": "../../etc"}),
        }
        no_epoch = await watcher.order("activate", {"lease_s": 90})
        for code, order in (*cases.items(), ("invalid", no_epoch)):
            final = await watcher.final(order)
            assert final.error is not None and (final.status, final.error.code, final.seq) == ("rejected", code, 1)
        broken_id = new_ulid()
        await watcher.link.publish(topics.command(NODE, "ping"), b'{"v":1,"id":"' + broken_id.encode() + b'"}')
        broken = await watcher.final(broken_id)
        assert broken.error is not None and broken.error.code == "invalid"


async def test_r7_what_is_journaled_while_the_node_ends_is_done_at_its_next_start(
    mosquitto: Mosquitto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_begun, may_go_on = threading.Event(), threading.Event()
    order = command("model.deploy", {"name": "tiny"})
    async with watching(mosquitto.host, mosquitto.port) as watcher:
        async with running_node(mosquitto.host, mosquitto.port, tmp_path) as node:
            await watcher.event("sync")
            receive = node.journal.receive

            def slowly(*arguments: Any) -> None:
                is_begun.set()
                may_go_on.wait(10)
                receive(*arguments)

            monkeypatch.setattr(node.journal, "receive", slowly)
            await watcher.send(order)
            assert await anyio.to_thread.run_sync(is_begun.wait, 10)
            threading.Timer(0.3, may_go_on.set).start()
        async with running_node(mosquitto.host, mosquitto.port, tmp_path):
            assert (await watcher.final(order.id)).status == "succeeded"


async def test_r5_the_same_id_again_has_no_effect_and_replays_the_result(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher:
        order = command("model.deploy", {"name": "tiny"})
        async with running_node(mosquitto.host, mosquitto.port, tmp_path) as node:
            await watcher.event("sync")
            await watcher.send(order)
            first = await watcher.final(order.id)
            await watcher.send(order)
            again = await watcher.replay(order.id)
            assert again.model_copy(update={"replayed": False}) == first
            assert node.started == ["tiny"]
        watcher.heard.clear()
        async with running_node(mosquitto.host, mosquitto.port, tmp_path) as node:
            await watcher.send(order)
            assert (await watcher.replay(order.id)).status == "succeeded"
            assert node.started == []


async def test_r6_a_command_too_old_is_rejected_by_the_brokers_counter(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with pair(mosquitto, tmp_path) as (watcher, node):
        order = command("model.deploy", {"name": "tiny"}, deadline_s=1.0)
        old = order.model_copy(update={"issued_at": wire_now() - timedelta(seconds=60)})
        # A bridge stripped the expiry: only then do the clocks decide.
        await watcher.link.publish(topics.command(NODE, "model.deploy"), encode(old))
        final = await watcher.final(order.id)
        assert final.error is not None and (final.status, final.error.code) == ("rejected", "expired")
        assert node.started == []


async def test_r6_age_by_broker_then_by_clock_then_unknown() -> None:
    order = command("ping", deadline_s=60.0)
    now = order.issued_at + timedelta(seconds=200)
    assert age_of(order, 57, now) == 3.0
    assert age_of(order, None, now) == 200.0
    assert age_of(order, None, None) == 0.0
    assert age_of(order, None, order.issued_at - timedelta(days=9)) == 0.0


async def test_r8_control_never_waits_for_work(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with pair(mosquitto, tmp_path) as (watcher, node):
        work = await watcher.order("diag.collect")
        await until(lambda: node.started == ["diag.collect"])
        queued = await watcher.order("model.deploy", {"name": "tiny"})
        assert (await watcher.final(await watcher.order("ping"))).status == "succeeded"
        assert (await watcher.final(await watcher.order("activate", {"lease_s": 60}, epoch=1))).status == "succeeded"
        assert node.standby.state.mode == "active"
        for order in (queued, work):
            await watcher.order("cancel", {"id": order})
            assert (await watcher.final(order)).status == "cancelled"
        await until(lambda: not node.commands._jobs)
        assert node.started == ["diag.collect"]
        assert (await watcher.final(await watcher.order("cancel", {"id": work}))).output == {"cancelled": False}


async def test_a_deadline_ends_what_takes_too_long(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with pair(mosquitto, tmp_path) as (watcher, _):
        order = await watcher.order("diag.collect", deadline_s=2.0)
        final = await watcher.final(order)
        assert final.error is not None and (final.status, final.error.code) == ("timed_out", "expired")
        progressed = [result for result in watcher.results(order) if result.progress == 0.5]
        assert len(progressed) <= 2  # at most one a second, of some forty reports


async def test_too_much_work_is_refused_at_once(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with pair(mosquitto, tmp_path) as (watcher, _):
        orders = [await watcher.order("diag.collect") for _ in range(33)]
        final = await watcher.final(orders[-1])
        assert final.error is not None and (final.status, final.error.code, final.error.retryable) == ("rejected", "busy", True)


async def test_l2_a_stale_epoch_is_refused_and_told_the_current_one(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with pair(mosquitto, tmp_path) as (watcher, node):
        await watcher.final(await watcher.order("activate", {"lease_s": 60}, epoch=5))
        stale = await watcher.final(await watcher.order("standby", epoch=4))
        assert stale.error is not None and (stale.error.code, stale.output) == ("stale_epoch", {"current": 5})
        assert node.standby.state.mode == "active"
        renewed = await watcher.final(await watcher.order("renew", {"lease_s": 300}, epoch=5))
        assert isinstance(left_s := renewed.output["lease_left_s"], float) and left_s > 250
        stood_down = await watcher.final(await watcher.order("standby", epoch=6))
        assert stood_down.output["mode"] == "standby"
        await watcher.state(lambda said: said.epoch == 6 and said.mode == "standby")


async def test_l2_a_replayed_old_activate_is_refused_after_sigkill(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher:
        first, second = command("activate", {"lease_s": 60}, epoch=1), command("standby", epoch=2)
        with node_process(mosquitto, tmp_path) as process:
            await watcher.event("sync")
            for order in (first, second):
                await watcher.send(order)
                await watcher.final(order.id)
            process.kill()
            await killed(process)
        with node_process(mosquitto, tmp_path):
            await watcher.event("sync", skip=1)
            await watcher.send(first)
            assert (await watcher.replay(first.id)).status == "succeeded"
            forged = await watcher.final(await watcher.order("activate", {"lease_s": 60}, epoch=1))
            assert forged.error is not None and forged.error.code == "stale_epoch"
            state = await watcher.state(lambda said: said.epoch == 2)
            assert state.mode == "standby"


@pytest.mark.parametrize(
    "edge", ["before-received", "after-received", "before-executing", "after-executing", "before-final", "after-final"]
)
async def test_r7_killed_at_every_edge_a_resumable_command_ends_once(mosquitto: Mosquitto, tmp_path: Path, edge: str) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher:
        with node_process(mosquitto, tmp_path, die=edge) as process:
            await watcher.event("sync")
            order = await watcher.order("model.deploy", {"name": "tiny"})
            await killed(process)
        with node_process(mosquitto, tmp_path):
            final = await watcher.final(order)
            await watcher.final(await watcher.order("ping"))
            assert final.status == "succeeded" and len(finals(watcher, order)) == 1


@pytest.mark.parametrize(("edge", "status"), [("after-received", "timed_out"), ("after-executing", "failed"), ("after-final", "cancelled")])
async def test_r7_killed_an_unresumable_command_is_never_begun_twice(mosquitto: Mosquitto, tmp_path: Path, edge: str, status: str) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher:
        with node_process(mosquitto, tmp_path, die=edge) as process:
            await watcher.event("sync")
            order = await watcher.order("diag.collect", deadline_s=4.0)
            if edge == "after-final":
                await until((tmp_path / "collecting").exists)
                await watcher.order("cancel", {"id": order})
            await killed(process)
        begun = (tmp_path / "collecting").exists()
        with node_process(mosquitto, tmp_path):
            final = await watcher.final(order)
            await watcher.final(await watcher.order("ping"))
        assert final.status == status and len(finals(watcher, order)) == 1
        assert begun == (edge == "after-final")
        if status == "failed":
            assert final.error is not None and final.error.code == "interrupted"


async def test_a_command_sent_while_the_node_is_away_waits_at_the_broker(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with watching(mosquitto.host, mosquitto.port) as watcher:
        async with running_node(mosquitto.host, mosquitto.port, tmp_path):
            await watcher.event("sync")
        order = await watcher.order("model.deploy", {"name": "tiny"}, deadline_s=60.0)
        async with running_node(mosquitto.host, mosquitto.port, tmp_path):
            assert (await watcher.final(order)).status == "succeeded"


async def test_bench_round_trip_of_a_command(mosquitto: Mosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times_ms = []
    async with pair(mosquitto, tmp_path) as (watcher, _node):
        for _ in range(30):
            began_s = time.perf_counter()
            order = await watcher.order("ping")
            with anyio.fail_after(10):
                await watcher.final(order)
            times_ms.append((time.perf_counter() - began_s) * 1000)
            watcher.heard.clear()
    with capsys.disabled():
        print(f"\ncommand round trip, journal on disk: p50 {statistics.median(times_ms):.1f} ms, max {max(times_ms):.1f} ms")  # noqa: T201


def test_the_command_of_a_newer_coordinator_keeps_its_unknown_fields_out_of_the_way() -> None:
    payload = encode(command("ping"))[:-1] + b',"priority":9}'
    assert Command.model_validate_json(payload).op == "ping"
