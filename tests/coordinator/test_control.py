"""The coordinator's whole work, with real nodes, a real broker and a primary that can be switched off."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from agent.demo.primary import SwitchablePrimary
from agent.protocol.lease import LeaseState
from tests.agent.link.broker import Mosquitto, running_mosquitto
from tests.coordinator.fleet import QUICK, coordinator_settings, fleet_node, running_coordinator, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path / "broker") as started:
        yield started


@asynccontextmanager
async def switchable_primary() -> AsyncIterator[SwitchablePrimary]:
    primary = SwitchablePrimary()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(primary.run)
        await until(lambda: primary.is_on)
        yield primary
        tasks.cancel_scope.cancel()


async def test_a_node_takes_over_when_the_primary_is_down_and_goes_home_when_it_is_back(broker: Mosquitto, tmp_path: Path) -> None:
    async with (
        switchable_primary() as primary,
        running_coordinator(coordinator_settings(broker, tmp_path, primary.url)) as coordinator,
        fleet_node(broker, tmp_path / "node") as node,
    ):
        await until(lambda: coordinator.is_online() and coordinator.control.primary.health.is_certain)
        row = coordinator.registry.node("edge-a")
        assert row is not None and row.meta is not None and row.meta.endpoint is not None
        assert (node.mode, coordinator.epoch(), coordinator.statuses("activate")) == ("standby", 0, [])
        await until(lambda: "127.0.0.1:8443 backup weight=2" in coordinator.backups())

        await primary.switch(on=False)
        await until(lambda: node.mode == "active")
        assert node.standby.lease.epoch == coordinator.epoch() == 1
        first_end_s = node.standby.lease.ends_at_s
        await until(lambda: coordinator.statuses("renew").count("succeeded") >= 2)
        assert node.standby.lease.ends_at_s > first_end_s
        assert node.standby.lease.epoch == coordinator.epoch() == 1, "a renewal repeats the epoch"
        assert coordinator.statuses("activate") == ["succeeded"]

        await primary.switch(on=True)
        await until(lambda: node.mode == "standby" and "succeeded" in coordinator.statuses("standby"))
        assert node.standby.lease.epoch == coordinator.epoch() == 2
        assert node.standby.lease.kind is None
        assert coordinator.statuses("standby") == ["succeeded"]


async def test_l7_warm_nodes_hold_contingent_leases_and_get_them_back_once_they_stand_by(broker: Mosquitto, tmp_path: Path) -> None:
    async with (
        switchable_primary() as primary,
        running_coordinator(coordinator_settings(broker, tmp_path, primary.url, contingent=True, contingent_s=2.0)) as coordinator,
        fleet_node(broker, tmp_path / "node") as node,
    ):
        await until(lambda: node.standby.lease.kind == "contingent")
        assert node.mode == "standby"
        await until(lambda: "succeeded" in coordinator.statuses("renew"))
        await primary.switch(on=False)
        await until(lambda: node.mode == "active" and node.standby.lease.kind == "full")
        await primary.switch(on=True)
        await until(lambda: node.mode == "standby" and node.standby.lease.kind is None)
        await until(lambda: node.standby.lease.kind == "contingent")
        assert coordinator.statuses("standby") == ["succeeded"], "asked once, then left to report its mode"
        assert coordinator.epoch() == node.standby.lease.epoch == 4


async def test_r1_a_lost_node_is_offline_by_its_will_and_not_ordered(broker: Mosquitto, tmp_path: Path) -> None:
    async with running_coordinator(coordinator_settings(broker, tmp_path, lease_s=0.6, renew_s=0.2)) as coordinator:
        async with fleet_node(broker, tmp_path / "node") as node:
            await until(lambda: node.mode == "active" and "127.0.0.1:8443" in coordinator.backups())
            node.lose()
        await until(lambda: coordinator.control.presence_of("edge-a") == "will")
        await until(lambda: "127.0.0.1:8443" not in coordinator.backups())
        given = len(coordinator.registry.commands("edge-a"))
        ends_s = anyio.current_time() + 0.9  # its lease has run out by then
        await until(lambda: anyio.current_time() > ends_s)
        assert len(coordinator.registry.commands("edge-a")) == given


async def test_r1_a_node_that_falls_silent_is_offline_after_three_heartbeats(broker: Mosquitto, tmp_path: Path) -> None:
    silent = replace(QUICK, will_delay_s=60)
    async with running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator:
        async with fleet_node(broker, tmp_path / "node", settings=silent) as node:
            await until(lambda: node.mode == "active")
            node.lose()
        await until(lambda: coordinator.registry.nodes()[0].is_silent)
        assert coordinator.control.presence_of("edge-a") == "silent"
        presence = coordinator.registry.nodes()[0].presence
        assert presence is not None and presence.state == "online", "the broker knows nothing of it"
        async with fleet_node(broker, tmp_path / "node", settings=silent):
            await until(coordinator.is_online)


async def test_a_clean_stop_is_told_by_its_reason(broker: Mosquitto, tmp_path: Path) -> None:
    async with running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator:
        async with fleet_node(broker, tmp_path / "node"):
            await until(coordinator.is_online)
        await until(lambda: coordinator.control.presence_of("edge-a") == "shutdown")


async def test_l5_a_rebooted_node_reports_no_lease_and_gets_a_new_one(broker: Mosquitto, tmp_path: Path) -> None:
    async with running_coordinator(coordinator_settings(broker, tmp_path, lease_s=60.0, renew_s=20.0)) as coordinator:
        async with fleet_node(broker, tmp_path / "node") as node:
            await until(lambda: node.mode == "active" and coordinator.statuses("activate") == ["succeeded"])
            node.lose()
        async with fleet_node(broker, tmp_path / "node", boot="boot-2") as node:
            assert node.standby.lease.held(0.0) is None and node.standby.lease.epoch == 1
            await until(lambda: node.mode == "active")
            await until(lambda: coordinator.statuses("activate") == ["succeeded"] * 2)
            assert coordinator.epoch() == node.standby.lease.epoch == 2


async def test_l3_an_epoch_behind_the_nodes_own_heals_itself(broker: Mosquitto, tmp_path: Path) -> None:
    async with running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator, fleet_node(broker, tmp_path / "node") as node:
        await until(lambda: node.mode == "active" and coordinator.statuses("activate") == ["succeeded"])
        # As if another coordinator, with a record of its own, had ordered in between, and no report had told of it.
        node.standby.adopt(LeaseState(epoch=40, last_id="elsewhere"))
        await until(lambda: node.mode == "active")
        await until(lambda: coordinator.statuses("activate")[-1] == "succeeded" and len(coordinator.statuses("activate")) >= 2)
        assert coordinator.epoch() == node.standby.lease.epoch > 40


async def test_a_drained_node_is_left_alone_until_an_operator_says_otherwise(broker: Mosquitto, tmp_path: Path) -> None:
    async with running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator, fleet_node(broker, tmp_path / "node") as node:
        await until(lambda: node.mode == "active")
        await coordinator.control.orders.send("edge-a", "drain", {}, 5.0)
        await until(lambda: node.mode == "standby" and coordinator.statuses("drain") == ["succeeded"])
        given = len(coordinator.statuses("activate"))
        await until(lambda: "8443" not in coordinator.backups())
        with anyio.move_on_after(0.5):
            await until(lambda: len(coordinator.statuses("activate")) > given)
            raise AssertionError("a drained node was activated")
        await coordinator.control.orders.send("edge-a", "standby", {}, 5.0)
        await until(lambda: node.mode == "active")
