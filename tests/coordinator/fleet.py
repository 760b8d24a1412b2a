"""A coordinator and real nodes (without models) around a real broker, all inside one test."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx
import uvicorn
from anyio.abc import TaskGroup

from agent.link.backoff import BackoffPolicy
from agent.link.broker import Broker
from agent.link.commands import Commands
from agent.link.events import Events
from agent.link.journal import Journal
from agent.link.outbox import Outbox
from agent.link.outcome import Output, Progress
from agent.link.reports import Reports
from agent.link.session import Session, SessionSettings, Uplink
from agent.protocol.messages import Backup, Desired, Endpoint, HeartbeatBody, MetaBody, ModelState, StateBody
from agent.protocol.operations import PingArgs
from agent.standby import Standby
from agent.telemetry.generic import boot_clock_s
from coordinator.config import CoordinatorSettings
from coordinator.control import Control
from coordinator.http import build_app
from coordinator.main import _serve, _Server
from coordinator.registry import Registry
from tests.agent.link.broker import Mosquitto

DEADLINE_S = 15.0
TINY = ModelState(name="tiny", status="serving", task="generation")
NOWHERE = "http://127.0.0.1:9"
QUICK = SessionSettings(
    heartbeat_active_s=0.2,
    heartbeat_standby_s=0.2,
    will_delay_s=0,
    backoff=BackoffPolicy(base_s=0.05, cap_s=0.2, takeover_cap_s=0.4, young_s=0.0),
)


async def until(fits: Callable[[], Any], what: str = "") -> None:
    with anyio.move_on_after(DEADLINE_S):
        while not fits():  # noqa: ASYNC110 — what is waited for has no event
            await anyio.sleep(0.02)
        return
    raise AssertionError(f"not within {DEADLINE_S} s: {what or fits}")


@dataclass
class Node:
    name: str
    standby: Standby
    session: Session
    documents: list[Desired]  # all that came
    _tasks: TaskGroup

    @property
    def mode(self) -> str:
        return self.standby.state.mode

    def lose(self) -> None:
        """The device dies: its connection ends without a word, and nothing of it runs any more."""
        link = self.session._link
        assert link is not None and link._socket is not None
        link._socket.shutdown(socket.SHUT_RDWR)
        self._tasks.cancel_scope.cancel()


@asynccontextmanager
async def fleet_node(
    broker: Mosquitto,
    folder: Path,
    name: str = "edge-a",
    *,
    boot: str = "boot-1",
    settings: SessionSettings = QUICK,
    port: int = 8443,
    revision: int = 0,
    agent: str = "0.1",
    models: tuple[ModelState, ...] = (TINY,),
) -> AsyncIterator[Node]:
    """All of a node's link: journal, commands, session, lease; `folder` is its disk, `revision` that of the document it has taken."""
    await anyio.Path(folder).mkdir(exist_ok=True)
    async with AsyncExitStack() as stack:
        journal = stack.enter_context(Journal(folder / f"{name}.sqlite", boot))
        outbox = stack.enter_context(Outbox(folder / f"{name}-outbox.sqlite", journal.boot))
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
        )

        async def ping(args: PingArgs, progress: Progress) -> Output:
            return {"echo": args.echo}

        commands = Commands(
            node=name,
            journal=journal,
            handlers={"ping": ping},
            lease=standby,
            clock=boot_clock_s,
            clock_is_synced=lambda: True,
            report_fault=events.fault,
        )
        meta = MetaBody(agent=agent, ops=commands.ops, endpoint=Endpoint(host="127.0.0.1", port=port), backup=Backup(weight=2))
        documents: list[Desired] = []

        def state() -> StateBody:
            latest = max((document.rev for document in documents), default=revision)
            return StateBody(models=models, desired_rev=latest, applied_rev=latest)

        def came(document: Desired) -> None:
            documents.append(document)
            session.state_changed()

        def heard(uplink: Uplink) -> None:
            standby.uplink_changed(broker_is_up=uplink.broker_is_up, coordinator_is_online=uplink.coordinator_is_online)

        session = Session(
            broker=Broker(broker.host, broker.port, name, timeout_s=5.0),
            journal=journal,
            outbox=outbox,
            events=events,
            commands=commands,
            reports=Reports(standby.standing, lambda: meta, state, HeartbeatBody),
            clock=boot_clock_s,
            clock_is_synced=lambda: True,
            on_uplink=heard,
            on_desired=came,
            settings=settings,
        )
        async with anyio.create_task_group() as tasks:
            for part in (standby.run, commands.run, session.run):
                tasks.start_soon(part)
            yield Node(name, standby, session, documents, tasks)
            tasks.cancel_scope.cancel()


def coordinator_settings(broker: Mosquitto, folder: Path, primary_url: str = NOWHERE, **leases: Any) -> CoordinatorSettings:
    """Everything some hundred times faster than in life. No contingent leases unless asked for."""
    return CoordinatorSettings.model_validate(
        {
            "name": "coord-a",
            "database": folder / "coordinator.sqlite",
            "primary": {"url": primary_url, "interval_s": 0.1, "timeout_s": 1.0, "failures": 2, "passes": 2},
            "broker": {"host": broker.host, "port": broker.port},
            "leases": {"lease_s": 3.0, "renew_s": 0.4, "contingent": False, "min_active_s": 0.0, "command_deadline_s": 5.0} | leases,
            "nginx": {"file": folder / "hotspare.conf", "test_command": ["true"], "reload_command": ["true"], "min_interval_s": 0.0},
        }
    )


@dataclass
class Coordinator:
    control: Control
    registry: Registry
    settings: CoordinatorSettings

    def epoch(self, node: str = "edge-a") -> int:
        row = self.registry.node(node)
        return row.epoch if row else -1

    def is_online(self, node: str = "edge-a") -> bool:
        return self.control.presence_of(node) == "online"

    def statuses(self, op: str, node: str = "edge-a") -> list[str]:
        """Of all orders of one op, the oldest first."""
        return [row.status for row in reversed(self.registry.commands(node)) if row.command.op == op]

    def backups(self) -> str:
        file = self.settings.nginx.file
        return file.read_text() if file is not None and file.is_file() else ""


@asynccontextmanager
async def running_coordinator(settings: CoordinatorSettings) -> AsyncIterator[Coordinator]:
    """Connected when it is handed out; ends as a killed one does: without goodbye, its will left to the broker."""
    registry = Registry(settings.database)
    try:
        async with httpx.AsyncClient(trust_env=False) as client, anyio.create_task_group() as tasks:
            control = Control(settings, registry, client, tick_s=0.05)
            tasks.start_soon(control.run)
            await until(lambda: control.is_connected)
            yield Coordinator(control, registry, settings)
            tasks.cancel_scope.cancel()
    finally:
        registry.close()


@asynccontextmanager
async def served(coordinator: Coordinator, token_file: Path | None = None) -> AsyncIterator[str]:
    """Its API and page on a real port; gives the address."""
    app = build_app(coordinator.control, coordinator.registry, token_file)
    server = _Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none", access_log=False, timeout_graceful_shutdown=2))
    ended = anyio.Event()
    with socket.create_server(("127.0.0.1", 0)) as bound:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_serve, server, bound, ended)
            await until(lambda: server.started)
            try:
                yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
            finally:
                server.should_exit = True
                with anyio.move_on_after(DEADLINE_S, shield=True):
                    await ended.wait()
