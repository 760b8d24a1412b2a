"""The mode machine: rules L5-L9 on frozen values with a clock of our own, then the component with a real journal."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
import pytest

from agent.link.journal import Journal
from agent.link.outcome import CommandFailed
from agent.mode import Allowed, Autonomy, Facts, Health, ModePolicy, ModeState, Refused, advance, may_serve
from agent.protocol.lease import Accept, LeaseOrder, LeaseState
from agent.standby import Standby

POLICY = ModePolicy(autonomous_max_s=600.0)
FULL = LeaseState(5, "five", "full", ends_at_s=100.0)
CONTINGENT = LeaseState(5, "five", "contingent", ends_at_s=3600.0)


@dataclass
class World:
    """A node's surroundings, moved by hand."""

    policy: ModePolicy = POLICY
    state: ModeState = field(default_factory=ModeState)
    facts: Facts = field(default_factory=lambda: Facts(0.0, LeaseState(), "ready", True, 0, 0, 0))

    def at(
        self,
        now_s: float,
        *,
        lease: LeaseState | None = None,
        reachable: bool | None = None,
        failures: int | None = None,
        passes: int | None = None,
        inflight: int | None = None,
        health: Health | None = None,
    ) -> str:
        before = self.facts
        self.facts = Facts(
            now_s,
            before.lease if lease is None else lease,
            before.health if health is None else health,
            before.coordinator_is_reachable if reachable is None else reachable,
            before.primary_failures if failures is None else failures,
            before.primary_passes if passes is None else passes,
            before.inflight if inflight is None else inflight,
        )
        self.state = advance(self.state, self.facts, self.policy)
        return self.state.mode

    def serves(self) -> bool:
        return isinstance(may_serve(self.state, self.facts.now_s), Allowed)


def test_l6_without_a_lease_the_gate_refuses_and_says_when_to_come_back() -> None:
    world = World()
    assert world.at(1.0) == "standby"
    refused = may_serve(world.state, 1.0)
    assert refused == Refused(30, "standby", "no_lease")
    assert world.at(2.0, health="starting") == "starting" and not world.serves()
    assert world.at(3.0, health="degraded", lease=FULL) == "degraded" and not world.serves()


def test_l6_the_gate_asks_the_lease_and_not_the_last_tick() -> None:
    world = World()
    assert world.at(1.0, lease=FULL) == "active"
    assert may_serve(world.state, 99.9) == Allowed()
    assert may_serve(world.state, 100.0) == Refused(5, "active", "lease_ended")


def test_l7_a_contingent_lease_serves_only_while_warm() -> None:
    world = World()
    assert world.at(1.0, lease=CONTINGENT) == "standby" and world.serves()
    assert may_serve(world.state, 3600.0) == Refused(30, "standby", "no_lease")
    assert world.at(2.0, health="degraded") == "degraded" and not world.serves()


def test_l8_lease_end_with_the_coordinator_there_drains_then_stands_by() -> None:
    world = World()
    world.at(1.0, lease=FULL, inflight=2)
    assert world.at(100.0) == "draining" and not world.serves()
    assert world.at(129.0) == "draining"
    assert world.at(130.0) == "standby"  # 30 s at most
    world = World()
    world.at(1.0, lease=FULL, inflight=2)
    world.at(100.0)
    assert world.at(101.0, inflight=0) == "standby"


def test_l8_lease_end_cut_off_with_a_dead_primary_is_autonomous_without_a_gap() -> None:
    world = World()
    world.at(1.0, lease=FULL)
    assert world.at(50.0, reachable=False, failures=3) == "active"  # the lease still says so
    assert world.at(100.0) == "autonomous" and world.serves()


def test_l8_cut_off_with_a_healthy_primary_stands_by() -> None:
    world = World()
    world.at(1.0, lease=FULL, reachable=False, passes=1)
    assert world.at(100.0) == "draining"
    assert world.at(101.0) == "standby"
    assert world.at(102.0, passes=0, failures=2) == "standby"
    assert world.at(103.0, failures=3) == "autonomous"


@pytest.mark.parametrize(
    ("change", "then"),
    [("order to stand by", "draining"), ("order to serve", "active"), ("primary passes", "draining"), ("time is up", "draining")],
)
def test_l8_autonomy_ends(change: str, then: str) -> None:
    world = World()
    world.at(1.0, reachable=False, failures=3)
    assert world.at(2.0, failures=0, passes=3) == "autonomous"  # three passes are not four
    match change:
        case "order to stand by":
            mode = world.at(3.0, reachable=True, lease=LeaseState(6, "six"))
        case "order to serve":
            mode = world.at(3.0, reachable=True, lease=replace(FULL, epoch=6))
        case "primary passes":
            mode = world.at(3.0, passes=4)
        case _:
            mode = world.at(601.0, passes=0, failures=9)
            assert world.at(700.0) == "standby"  # and does not begin again by itself
            world.at(701.0, reachable=True)
            assert world.at(702.0, reachable=False) == "autonomous"
            return
    assert mode == then


def test_l8_a_link_that_comes_back_does_not_end_autonomy_only_an_order_does() -> None:
    world = World()
    world.at(1.0, reachable=False, failures=3)
    assert world.at(2.0, reachable=True) == "autonomous"


def test_a_drained_node_does_not_serve_by_itself() -> None:
    world = World()
    world.at(1.0, lease=LeaseState(6, "six", is_drained=True))
    assert world.at(2.0, reachable=False, failures=9) == "standby"
    assert may_serve(world.state, 2.0) == Refused(30, "standby", "drained")


def test_a_node_without_a_broker_always_serves() -> None:
    world = World(policy=ModePolicy(is_standalone=True))
    assert world.at(1.0, reachable=False) == "active" and world.state.reason == "standalone" and world.serves()
    assert world.at(2.0, health="degraded") == "degraded" and not world.serves()


class Device:
    """What surrounds a Standby: clock, health and load are set by the test."""

    def __init__(self, journal: Journal, policy: ModePolicy = POLICY) -> None:
        self.journal = journal
        self.policy = policy
        self.now_s = 0.0
        self.health: Health = "ready"
        self.primary_is_healthy = False
        self.changes: list[str] = []

    async def probe(self) -> bool:
        return self.primary_is_healthy

    def standby(self, prepare: Callable[[], Awaitable[None]] | None = None) -> Standby:
        return Standby(
            store=self.journal,
            lease=self.journal.load_lease(),
            autonomy=self.journal.load_autonomy(),
            clock=lambda: self.now_s,
            health=lambda: self.health,
            inflight=lambda: 0,
            probe_primary=self.probe,
            on_change=lambda before, after: self.changes.append(after.mode),
            prepare=prepare,
            policy=self.policy,
            probe_interval_s=0.001,
        )


async def progress(fraction: float | None = None, step: str | None = None) -> None:
    pass


def adopt(standby: Standby, order: LeaseOrder) -> None:
    decision = standby.decide(order)
    assert isinstance(decision, Accept)
    standby._store.save_lease(decision.state)
    standby.adopt(decision.state)


async def mode_is(standby: Standby, mode: str) -> None:
    with anyio.fail_after(5):
        while True:
            if standby.state.mode == mode:
                return
            await anyio.sleep(0.005)


@pytest.mark.anyio
async def test_l8_autonomy_survives_a_reboot_and_l9_a_higher_epoch_ends_it(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite", "boot-1") as journal:
        standby = Device(journal).standby()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(standby.run)
            await mode_is(standby, "autonomous")
            with anyio.fail_after(5):
                while True:
                    if journal.load_autonomy() is not None:
                        break
                    await anyio.sleep(0.005)
            tasks.cancel_scope.cancel()
    with Journal(tmp_path / "journal.sqlite", "boot-2") as journal:
        device = Device(journal)
        standby = device.standby()
        standby.uplink_changed(broker_is_up=True, coordinator_is_online=True)
        assert standby.standing().mode == "autonomous"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(standby.run)
            adopt(standby, LeaseOrder("activate", "one", 1, 90.0))
            await mode_is(standby, "active")
            with anyio.fail_after(5):
                while True:
                    if journal.load_autonomy() is None:
                        break
                    await anyio.sleep(0.005)
            tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_l5_a_reboot_keeps_the_epoch_and_a_mere_restart_the_lease_too(tmp_path: Path) -> None:
    for boot, held in (("boot-1", "full"), ("boot-1", "full"), ("boot-2", None)):
        with Journal(tmp_path / "journal.sqlite", boot) as journal:
            standby = Device(journal).standby()
            if standby.lease.epoch == 0:
                adopt(standby, LeaseOrder("activate", "one", 1, 90.0))
            assert (standby.lease.epoch, standby.lease.held(1.0)) == (1, held)


@pytest.mark.anyio
async def test_activate_answers_once_the_node_really_serves(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite", "boot-1") as journal:
        device = Device(journal)
        device.health = "starting"
        warmed: list[str] = []

        async def prepare() -> None:
            warmed.append(standby.state.mode)
            device.health = "ready"

        standby = device.standby(prepare)
        order = LeaseOrder("activate", "one", 1, 90.0)
        adopt(standby, order)
        assert standby.state.mode == "starting"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(standby.run)
            output = await standby.carry_out(order, progress)
            tasks.cancel_scope.cancel()
        assert output["mode"] == "active" and warmed == ["starting"]


@pytest.mark.anyio
async def test_a_node_that_cannot_serve_gives_the_lease_back(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite", "boot-1") as journal:
        device = Device(journal)
        device.health = "degraded"
        standby = device.standby()
        order = LeaseOrder("activate", "two", 2, 90.0)
        adopt(standby, order)
        with pytest.raises(CommandFailed) as failure:
            await standby.carry_out(order, progress)
        assert failure.value.code == "unhealthy"
        assert journal.load_lease() == standby.lease == LeaseState(2, "two")


@pytest.mark.anyio
async def test_an_order_overtaken_by_a_newer_one_says_so(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite", "boot-1") as journal:
        standby = Device(journal).standby()
        old = LeaseOrder("activate", "one", 1, 90.0)
        adopt(standby, old)
        adopt(standby, LeaseOrder("standby", "two", 2))
        with pytest.raises(CommandFailed) as failure:
            await standby.carry_out(old, progress)
        assert (failure.value.code, failure.value.output) == ("stale_epoch", {"current": 2})


def test_an_autonomy_of_an_earlier_life_counts_its_time() -> None:
    world = World(state=ModeState(autonomy=Autonomy(0, spent_s=590.0), autonomous_since_s=0.0))
    assert world.at(5.0, reachable=False, failures=9) == "autonomous"
    assert world.at(10.0) == "draining"
