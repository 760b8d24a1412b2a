"""Composition root of the node: the only place that wires. Starts the parts, says READY, and ends them in order on SIGTERM."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
from anyio import to_thread
from prometheus_client import CollectorRegistry

from agent.announcements import Announcements
from agent.batches.side import BatchSide, open_batches
from agent.cameras.commands import camera_handlers
from agent.cameras.configured import configured
from agent.cameras.side import CameraSide
from agent.cameras.store import EventStore
from agent.config import Settings
from agent.deployments import LocalDeployments
from agent.desired import DesiredState
from agent.documents import Documents
from agent.endpoint import configured_endpoint, own_names, page_url, routed_endpoint
from agent.engine_locks import folders_in_use
from agent.engine_options import node_options
from agent.gateway.keys import KeyFile
from agent.gateway.probe import probe_primary
from agent.gateway.side import GatewaySide
from agent.history import History
from agent.http.app import create_app
from agent.http.collaborators import Limits, Services, nobody
from agent.http.demo import RemoteSwitch
from agent.http.keys import KeysFile
from agent.http.server import HttpServer, bind
from agent.known_models import KnownModels
from agent.link.commands import Commands
from agent.link.configured import configured_broker
from agent.link.events import Events
from agent.link.journal import Journal
from agent.link.outbox import Outbox
from agent.link.reports import Reports
from agent.link.session import Session, SessionSettings, Uplink
from agent.link.store import StoreError as LinkStoreError
from agent.mode import Health, ModePolicy, ModeState
from agent.orders import Orders
from agent.plan import RestPolicy, wanted_models
from agent.preflight import checked, keys_file
from agent.prepare import preparer_of
from agent.protocol.messages import HttpLoad
from agent.reconcile import Reconciler
from agent.restart import Restart
from agent.sdnotify import notify
from agent.served import ServedModels, WithLanguage
from agent.standby import Standby
from agent.state import Asleep, Broken, Serving, WorkerName
from agent.supervision.incarnation import SupervisionSettings
from agent.supervision.process import worker_command
from agent.supervision.state import Quarantined, WorkerState
from agent.supervision.state import Running as WorkerRunning
from agent.supervision.worker import Worker
from agent.telemetry.generic import Reading, boot_clock_s, clock_is_synced, kernel_boot_id
from agent.telemetry.sensors import open_sensors
from agent.text import TextService
from agent.view import View
from agent.warmth import Warmth
from agent.watchdog import SignsOfLife, feed_watchdog
from models.durable import StoreError, exclusive
from models.store import Store, open_store

logger = logging.getLogger(__name__)

Part = Callable[[], Coroutine[Any, Any, None]]

DRAIN_S = 10.0
LOCK_S = 2.0
SENSE_S = 5.0
ENDPOINT_S = 60.0
RECONCILER_SILENT_S = 20.0
SESSION_SILENT_S = 900.0  # over the longest pause between two attempts to connect, or two heartbeats


async def run_node(settings: Settings, file: Path | None = None) -> int:
    """Runs until SIGTERM or SIGINT. The cameras of `file`, where the settings came from, may be edited meanwhile.

    Raises StartError, and ConfigurationError for what only shows when files are read.
    """
    known = KnownModels(settings.models.store or settings.node.state)
    settings = await to_thread.run_sync(lambda: checked(settings, known.catalog))
    keys = await to_thread.run_sync(keys_file, settings.http.keys_file)
    state = settings.node.state
    with ExitStack() as stack:
        try:
            store = await to_thread.run_sync(open_store, settings.models.store or state)
            stack.enter_context(exclusive(state / "node.lock", LOCK_S, f"the state folder {state}, of which every node needs its own"))
            journal = stack.enter_context(Journal(state / "journal.sqlite", kernel_boot_id()))
            outbox = stack.enter_context(Outbox(state / "outbox.sqlite", journal.boot))
            sightings = stack.enter_context(EventStore(state / "cameras.sqlite"))
            desired = DesiredState(configured(settings), state)
            batches = await to_thread.run_sync(open_batches, settings.batches, state, clock_is_synced)
            listener = stack.enter_context(closing(bind(settings.http.host, settings.http.port)))
        except (StoreError, LinkStoreError, OSError) as error:
            raise StartError(str(error)) from error
        async with AsyncExitStack() as connections:
            client = await connections.enter_async_context(httpx.AsyncClient(trust_env=False))
            node = _Node(settings, known, store, desired, journal, outbox, sightings, client)
            if file is not None:
                node.cameras.follow(file, settings, lambda read: checked(read, known.catalog), desired)
            demo = await connections.enter_async_context(RemoteSwitch(settings.demo.switch_url)) if settings.demo.switch_url else None
            await node.run(listener, keys, demo, batches)
    return 0


class StartError(Exception):
    """The node cannot start here and now; the message says why and what to do."""


class _Node:
    """The parts of one node and the wires between them."""

    def __init__(
        self,
        settings: Settings,
        known: KnownModels,
        store: Store,
        desired: DesiredState,
        journal: Journal,
        outbox: Outbox,
        sightings: EventStore,
        client: httpx.AsyncClient,
    ) -> None:
        self.settings = settings
        self._client = client
        self._primary_key = KeyFile(settings.primary.key_file).key
        self._known = known
        self._desired = desired
        self._history = History()
        self._reading = Reading()
        self._uplink: Uplink | None = Uplink() if settings.mqtt.host else None
        self.cameras = CameraSide(settings.events, sightings, settings.node.state, self._history, clock_is_synced, self._changed)
        supervision = SupervisionSettings(hang_s=settings.worker.hang_s)
        command = worker_command(settings.worker.python)
        self._workers: dict[WorkerName, Worker] = {
            "text": Worker("text", command, supervision, on_state=partial(self._worker_changed, "text")),
            "vision": Worker("vision", command, supervision, self.cameras.on_report, partial(self._worker_changed, "vision")),
        }
        self._served = ServedModels(self._workers, settings.models.aliases, settings.worker.context_tokens)
        self._preparer = preparer_of(settings, store, lambda: known.pinned(store, wanted_models(desired.value)))
        preparation, options = WithLanguage(self._preparer, self._served), node_options(settings, store)
        trusting, rest = settings.convert.accept_unverified, RestPolicy(settings.models.idle_s, settings.models.keep_free_mb << 20)
        self._reconciler = Reconciler(self._desired, known.find, preparation, self._workers, options, trusting, self.cameras.told, rest)
        self.cameras.connect(self._workers["vision"], self._workers["text"], self._desired, self._reconciler, known.find)
        self._served.reconciler = self._reconciler
        self._desired.on_change = self._reconciler.wake
        self._reconciler.on_change = self._changed
        self._in_flight: Callable[[], int] = lambda: 0
        self._standby = self._make_standby(journal)
        workers = list(self._workers.values())
        mine = (self._standby, workers, self._history, lambda: self._uplink, lambda: self._reading)
        self._view = View(settings, self._desired, self._reconciler, *mine)
        self._events = Events(node=settings.node.id, outbox=outbox, clock=boot_clock_s)
        diagnostics = {**self._view.diagnostics(), "telemetry": lambda: self._reading.heartbeat(HttpLoad()).model_dump(mode="json")}
        self._announcements = Announcements(self._events, self._history)
        self._reconciler.on_note = self._announcements.model
        self._documents = Documents(self._desired, known, self._is_autonomous, self._announcements.desired)
        self._orders = Orders(self._desired, self._reconciler, known.find, diagnostics, self._is_autonomous)
        self._commands = Commands(
            node=settings.node.id,
            journal=journal,
            handlers={**self._orders.handlers(), **camera_handlers(self.cameras.orders), **Restart().handlers()},
            cancellers=self._orders.cancellers(),
            lease=self._standby,
            clock=boot_clock_s,
            clock_is_synced=clock_is_synced,
            report_fault=self._events.fault,
        )
        self._session = self._make_session(journal, outbox) if settings.mqtt.host else None
        if self._session is not None:
            url = partial(page_url, lambda: self._view.endpoint)
            self.cameras.broadcast_to(settings.node.id, self._events, self._session, settings.home_assistant, url)

    async def run(self, listener: socket.socket, keys: KeysFile | None, demo: RemoteSwitch | None, batches: BatchSide) -> None:
        text = TextService(self._served.resolve, Warmth(self._reconciler, self._workers["text"]))
        gateway = GatewaySide(self.settings, text, self._served, partial(self._history.add, "gateway"))
        services = Services(
            node_id=self.settings.node.id,
            node=self._view,
            gate=self._standby.may_serve,
            text=text,
            vision=self.cameras.vision,
            demo=demo,
            keys=keys.keys if keys else nobody,
            deployments=LocalDeployments(self._orders),
            cameras=self.cameras.orders,
            sightings=self.cameras.keeper,
            meant=self._served.meant,
            names=own_names(self.settings),
            batches=batches.store,
        )
        http = self.settings.http
        limits = Limits(in_flight=http.in_flight, forwarded=http.forwarded, upload_bytes=batches.store.limits.file_bytes)
        services = gateway.before(services)
        app = create_app(services, CollectorRegistry(), limits)
        self._in_flight = lambda: app.in_flight.count
        server = HttpServer(app.asgi, listener, limits, stop_s=DRAIN_S, closing=app.closing)
        self._view.endpoint = configured_endpoint(self.settings, server.port)
        # The receiver is around everything, so that a second signal finds it too and does not cut the ending short.
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with anyio.create_task_group() as tasks:
                for part in (server.run, *gateway.parts(), *self._parts(server.port)):
                    tasks.start_soon(part)
                tasks.start_soon(batches.run, app.ask, services.gate, app.closing)
                await server.started.wait()
                logger.info("node %s serves %s", self.settings.node.id, server.url)
                # Not after MQTT: a node without its network must start too.
                notify("READY=1")
                tasks.start_soon(feed_watchdog, self._signs_of_life())
                async for _ in signals:
                    break
                notify("STOPPING=1")
                logger.info("stopping")
                server.stop()
                await app.in_flight.wait_idle(DRAIN_S)
                async with anyio.create_task_group() as workers:
                    for worker in self._workers.values():
                        workers.start_soon(worker.stop)
                tasks.cancel_scope.cancel()

    def _parts(self, port: int) -> list[Part]:
        parts: list[Part] = [
            *(worker.run for worker in self._workers.values()),
            self._reconciler.run,
            self._standby.run,
            self._commands.run,
            self._announcements.run,
            *self.cameras.parts(),
        ]
        if self._session is not None:
            parts += [self._session.run, self._sense]
            if self._view.endpoint is None:
                parts.append(partial(self._watch_endpoint, port))
        return parts

    def _signs_of_life(self) -> SignsOfLife:
        reconciler, session = self._reconciler, self._session
        signs: dict[str, tuple[Callable[[], float], float]] = {"reconciler": (lambda: reconciler.ticked_s, RECONCILER_SILENT_S)}
        if session is not None:
            limit_s = max(SESSION_SILENT_S, 3 * self.settings.mqtt.heartbeat_standby_s)
            signs["session"] = (lambda: session.ticked_s, limit_s)
        return signs

    # ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _make_standby(self, journal: Journal) -> Standby:
        primary = self.settings.primary
        policy = ModePolicy(
            is_standalone=not self.settings.mqtt.host,
            primary_failures=primary.failures,
            primary_passes=primary.passes,
            autonomous_max_s=primary.autonomous_max_s,
        )
        return Standby(
            store=journal,
            lease=journal.load_lease(),
            autonomy=journal.load_autonomy(),
            clock=boot_clock_s,
            health=self._health,
            inflight=lambda: self._in_flight(),  # noqa: PLW0108 — known only once the application is made
            probe_primary=self._probe_primary if primary.url and self.settings.mqtt.host else None,
            on_change=self._mode_changed,
            prepare=Warmth(self._reconciler, self._workers["text"]).warm_up,
            policy=policy,
            probe_interval_s=primary.interval_s,
            probe_timeout_s=primary.timeout_s + 1.0,
        )

    def _make_session(self, journal: Journal, outbox: Outbox) -> Session:
        mqtt = self.settings.mqtt
        reports = Reports(
            standing=self._standby.standing,
            meta=lambda: self._view.meta(self._commands.ops),
            state=self._view.state_body,
            heartbeat=lambda: self._reading.heartbeat(HttpLoad(inflight=self._in_flight())),
        )
        return Session(
            broker=configured_broker(self.settings),
            journal=journal,
            outbox=outbox,
            events=self._events,
            commands=self._commands,
            reports=reports,
            clock=boot_clock_s,
            clock_is_synced=clock_is_synced,
            on_uplink=self._uplink_changed,
            on_desired=self._documents.came,
            settings=SessionSettings(mqtt.heartbeat_active_s, mqtt.heartbeat_standby_s),
            on_switch=self.cameras.switched if self.settings.home_assistant.prefix else None,
        )

    # ── wires ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _probe_primary(self) -> bool:
        primary = self.settings.primary
        return (await probe_primary(self._client, primary.url, primary.model, self._primary_key(), primary.timeout_s)).is_good

    def _health(self) -> Health:
        """Ready with one model to ask; degraded when nothing is on its way to becoming one."""
        states = self._reconciler.models
        wanted = self._desired.value.models
        if not wanted or any(isinstance(states.get(model), Serving | Asleep) for model in wanted):
            return "ready"
        is_hopeless = all(isinstance(states.get(model), Broken) for model in wanted) or isinstance(self._workers["text"].state, Quarantined)
        return "degraded" if is_hopeless else "starting"

    def _changed(self) -> None:
        self._preparer.locks.keep(folders_in_use(self._reconciler.actual))
        self._standby.health_changed()
        if self._session is not None:
            self._session.state_changed()

    def _worker_changed(self, name: WorkerName, state: WorkerState) -> None:
        if not isinstance(state, WorkerRunning):
            if (cause := getattr(state, "cause", None)) is not None:
                self._history.add("worker", "error", f"{name} worker: {cause.text}")
        else:
            self._history.add("worker", "info", f"{name} worker runs as process {state.pid}")
        if name == "vision":
            self.cameras.worker_changed(state)
        self._reconciler.wake()
        self._changed()

    def _mode_changed(self, before: ModeState, after: ModeState) -> None:
        if before.mode != after.mode:
            reason = after.reason.replace("_", " ")
            self._history.add("mode", "info", f"{after.mode}, was {before.mode}: {reason}")
            self._notify_status(after)
        if self._session is not None:
            self._session.state_changed()
        if after.autonomy is None:
            self._documents.released()

    def _notify_status(self, state: ModeState) -> None:
        uplink = "standalone" if self._uplink is None else f"broker {'up' if self._uplink.broker_is_up else 'lost'}"
        notify(f"STATUS={state.mode}, epoch {state.lease.epoch}, {uplink}")

    def _uplink_changed(self, uplink: Uplink) -> None:
        self._uplink = uplink
        broker = "broker up" if uplink.broker_is_up else "broker lost"
        coordinator = "coordinator up" if uplink.coordinator_is_online else "no coordinator"
        self._history.add("uplink", "info" if uplink.broker_is_up else "warning", f"{broker}, {coordinator}")
        self._standby.uplink_changed(broker_is_up=uplink.broker_is_up, coordinator_is_online=uplink.coordinator_is_online)
        self._notify_status(self._standby.state)

    def _is_autonomous(self) -> bool:
        return self._standby.state.autonomy is not None

    async def _sense(self) -> None:
        """Sensors may take their time: a heartbeat carries the last reading."""
        sensors = open_sensors()
        while True:
            self._reading = await to_thread.run_sync(sensors, abandon_on_cancel=True)
            await anyio.sleep(SENSE_S)

    async def _watch_endpoint(self, port: int) -> None:
        """Our address on the way to the broker, which may come late and change."""
        while True:
            found = await to_thread.run_sync(routed_endpoint, self.settings, port, abandon_on_cancel=True)
            if found is not None and found != self._view.endpoint:
                logger.info("clients reach this node at %s port %d", found.host, found.port)
                self._view.endpoint = found
                if self._session is not None:
                    self._session.meta_changed()
            await anyio.sleep(ENDPOINT_S if self._view.endpoint else 1.0)
