"""A whole node without models: journal, outbox, lease, commands and session, inside a test or as a process of its own."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from agent.link.backoff import BackoffPolicy
from agent.link.broker import Broker
from agent.link.commands import Commands
from agent.link.events import Events
from agent.link.journal import Journal
from agent.link.outbox import Outbox
from agent.link.outcome import CommandFailed, Handler, Output, Progress
from agent.link.reports import Reports
from agent.link.session import Session, SessionSettings, Uplink
from agent.mode import ModePolicy
from agent.protocol.messages import Desired, HeartbeatBody, MetaBody, Result, StateBody
from agent.protocol.operations import DiagCollectArgs, ModelDeployArgs, PingArgs, PipelineStartArgs
from agent.protocol.wire import FINAL_STATUSES
from agent.standby import Standby
from agent.telemetry.generic import boot_clock_s, kernel_boot_id

NODE = "jetson-0001"
QUICK = SessionSettings(
    heartbeat_active_s=0.2,
    heartbeat_standby_s=0.2,
    will_delay_s=0,
    backoff=BackoffPolicy(base_s=0.05, cap_s=0.2, takeover_cap_s=0.4, young_s=0.0),
)


@dataclass
class Node:
    """The parts, and what the outside world told them."""

    journal: Journal
    outbox: Outbox
    events: Events
    standby: Standby
    commands: Commands
    session: Session
    started: list[str] = field(default_factory=list)
    desired: list[Desired] = field(default_factory=list)
    uplinks: list[Uplink] = field(default_factory=list)


async def until(question: Callable[[], object]) -> None:
    """Waits for what has no signal of its own, with a deadline."""
    with anyio.fail_after(15):
        while True:
            if question():
                return
            await anyio.sleep(0.01)


async def cut(node: Node) -> None:
    """Takes the connection away below the protocol, as a pulled cable does."""
    await until(lambda: node.session._link is not None)
    link = node.session._link
    assert link is not None and link._socket is not None
    link._socket.shutdown(socket.SHUT_RDWR)


def handlers(folder: Path, started: list[str]) -> dict[str, Handler]:
    """`ping` answers, `diag.collect` takes for ever, `model.deploy` leaves a line, `pipeline.start` fails."""

    async def ping(args: PingArgs, progress: Progress) -> Output:
        return {"echo": args.echo}

    async def collect(args: DiagCollectArgs, progress: Progress) -> Output:
        started.append("diag.collect")
        (folder / "collecting").touch()
        while True:
            await progress(0.5, "collecting")
            await anyio.sleep(0.05)

    async def deploy(args: ModelDeployArgs, progress: Progress) -> Output:
        started.append(args.name)
        with (folder / "deployed").open("a") as file:
            file.write(f"{args.name}\n")
        return {"name": args.name}

    async def start(args: PipelineStartArgs, progress: Progress) -> Output:
        raise CommandFailed("no_space", f"pipeline {args.id} needs 3 GB, 1 GB is free")

    return {"ping": ping, "diag.collect": collect, "model.deploy": deploy, "pipeline.start": start}


@asynccontextmanager
async def running_node(
    host: str,
    port: int,
    folder: Path,
    *,
    name: str = NODE,
    boot: str = "boot-1",
    settings: SessionSettings = QUICK,
    journal_class: Callable[[Path, str], Journal] = Journal,
    policy: ModePolicy = ModePolicy(),  # noqa: B008 - frozen
) -> AsyncIterator[Node]:
    started: list[str] = []
    desired: list[Desired] = []
    uplinks: list[Uplink] = []
    async with AsyncExitStack() as stack:
        journal = stack.enter_context(journal_class(folder / "journal.sqlite", boot))
        outbox = stack.enter_context(Outbox(folder / "outbox.sqlite", journal.boot))
        events = Events(node=name, outbox=outbox, clock=boot_clock_s)
        standby = Standby(
            store=journal,
            lease=journal.load_lease(),
            autonomy=journal.load_autonomy(),
            clock=boot_clock_s,
            health=lambda: "ready",
            inflight=lambda: 0,
            probe_primary=None,
            on_change=lambda before, after: session.state_changed(),
            policy=policy,
        )
        commands = Commands(
            node=name,
            journal=journal,
            handlers=handlers(folder, started),
            lease=standby,
            clock=boot_clock_s,
            clock_is_synced=lambda: True,
            report_fault=events.fault,
        )

        def heard(uplink: Uplink) -> None:
            uplinks.append(uplink)
            standby.uplink_changed(broker_is_up=uplink.broker_is_up, coordinator_is_online=uplink.coordinator_is_online)

        session = Session(
            broker=Broker(host, port, name, timeout_s=5.0),
            journal=journal,
            outbox=outbox,
            events=events,
            commands=commands,
            reports=Reports(standby.standing, lambda: MetaBody(agent="0.1", ops=commands.ops), StateBody, HeartbeatBody),
            clock=boot_clock_s,
            clock_is_synced=lambda: True,
            on_uplink=heard,
            on_desired=desired.append,
            settings=settings,
        )
        async with anyio.create_task_group() as tasks:
            for part in (standby.run, commands.run, session.run):
                tasks.start_soon(part)
            yield Node(journal, outbox, events, standby, commands, session, started, desired, uplinks)
            tasks.cancel_scope.cancel()


class DyingJournal(Journal):
    """Kills its own process, with no chance to clean up, at the named edge of the command's life."""

    edge = ""

    def receive(self, *given: object, **named: object) -> None:
        self._die_at("before-received")
        super().receive(*given, **named)  # type: ignore[arg-type]  # passed through
        self._die_at("after-received")

    def step(self, result: Result, survives_power_cut: bool = True) -> bool:
        if result.op == "cancel":
            return super().step(result, survives_power_cut)
        name = "final" if result.status in FINAL_STATUSES else result.status
        self._die_at(f"before-{name}")
        done = super().step(result, survives_power_cut)
        self._die_at(f"after-{name}")
        return done

    def _die_at(self, edge: str) -> None:
        if edge == self.edge:
            os.kill(os.getpid(), signal.SIGKILL)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--die", default="")
    given = parser.parse_args()
    DyingJournal.edge = given.die
    boot = kernel_boot_id() or uuid.uuid4().hex
    async with running_node("127.0.0.1", given.port, given.folder, boot=boot, journal_class=DyingJournal):
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(main)
