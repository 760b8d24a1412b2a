"""Composition root of the node: the only place that wires. Starts the parts, says READY, and ends them in order on SIGTERM."""

from __future__ import annotations

import json
import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, closing
from functools import partial
from pathlib import Path

import anyio
import httpx
from anyio import to_thread
from prometheus_client import CollectorRegistry

from agent.config import ConfigurationError, Settings
from agent.desired import DesiredState
from agent.gateway.probe import probe_primary
from agent.history import History
from agent.http.app import create_app
from agent.http.collaborators import Services
from agent.http.demo import RemoteSwitch
from agent.http.server import HttpServer, bind
from agent.link.broker import Broker
from agent.link.commands import Commands
from agent.link.events import Events
from agent.link.journal import Journal
from agent.link.outbox import Outbox
from agent.link.reports import Reports
from agent.link.session import Session, SessionSettings, Uplink
from agent.link.store import StoreError as LinkStoreError
from agent.mode import Health, ModePolicy, ModeState
from agent.orders import Orders
from agent.prepare import prepare_model
from agent.protocol.messages import Desired as DesiredDocument
from agent.protocol.messages import Endpoint, HttpLoad
from agent.reconcile import Built, Progress, Reconciler
from agent.sdnotify import notify, watchdog_interval_s
from agent.served import ServedModels
from agent.standby import Standby
from agent.state import Broken, Desired, Serving, WorkerName
from agent.supervision.incarnation import SupervisionSettings
from agent.supervision.process import worker_command
from agent.supervision.state import Quarantined, WorkerState
from agent.supervision.state import Running as WorkerRunning
from agent.supervision.worker import Worker
from agent.telemetry.generic import boot_clock_s, clock_is_synced, kernel_boot_id
from agent.telemetry.sensors import open_sensors
from agent.text import TextService
from agent.view import View
from agent.vision import VisionService
from agent.worker_protocol import CameraEvent
from models.catalog import load_catalog
from models.durable import StoreError, exclusive
from models.manifest import Manifest
from models.store import open_store

logger = logging.getLogger(__name__)

BUILD_DEADLINE_S = 2 * 3600.0
DRAIN_S = 10.0
LOCK_S = 2.0
CAMERA_EVENTS_WAITING = 256


async def run_node(settings: Settings) -> int:
    """Runs until SIGTERM or SIGINT. Raises StartError, and ConfigurationError for what only shows when files are read."""
    state = settings.node.state
    with ExitStack() as stack:
        try:
            store = await to_thread.run_sync(open_store, settings.models.store or state)
            stack.enter_context(exclusive(state / "node.lock", LOCK_S, f"the state folder {state}, of which every node needs its own"))
            journal = stack.enter_context(Journal(state / "journal.sqlite", kernel_boot_id()))
            outbox = stack.enter_context(Outbox(state / "outbox.sqlite", journal.boot))
            listener = bind(settings.http.host, settings.http.port)
        except (StoreError, LinkStoreError, OSError) as error:
            raise StartError(str(error)) from error
        stack.enter_context(closing(listener))
        key_digests = await to_thread.run_sync(_key_digests, settings.http.keys_file)
        async with AsyncExitStack() as connections:
            client = await connections.enter_async_context(httpx.AsyncClient(trust_env=False))
            node = _Node(settings, journal, outbox, client)
            node.prepare = partial(prepare_model, store, settings.worker.threads or 2, BUILD_DEADLINE_S)
            demo = await connections.enter_async_context(RemoteSwitch(settings.demo.switch_url)) if settings.demo.switch_url else None
            await node.run(listener, key_digests, demo)
    return 0


class StartError(Exception):
    """The node cannot start here and now; the message says why and what to do."""


class _Node:
    """The parts of one node and the wires between them."""

    def __init__(self, settings: Settings, journal: Journal, outbox: Outbox, client: httpx.AsyncClient) -> None:
        self.settings = settings
        self.prepare: Callable[[Manifest, Progress], Awaitable[Built]]
        self._client = client
        self._catalog = load_catalog()
        self._history = History()
        self._dropped_camera_events = 0
        self._uplink: Uplink | None = Uplink() if settings.mqtt.host else None
        self._camera_in, self._camera_out = anyio.create_memory_object_stream[CameraEvent](CAMERA_EVENTS_WAITING)
        supervision = SupervisionSettings(hang_s=settings.worker.hang_s)
        command = worker_command(settings.worker.python)
        self._workers: dict[WorkerName, Worker] = {
            "text": Worker("text", command, supervision, on_state=partial(self._worker_changed, "text")),
            "vision": Worker("vision", command, supervision, self._vision_reported, partial(self._worker_changed, "vision")),
        }
        self._vision = VisionService(self._workers["vision"], self._camera_event)
        self._served = ServedModels(self._workers, settings.models.aliases, settings.worker.context_tokens)
        pipelines = {camera.id: camera.pipeline() for camera in settings.cameras}
        self._desired = DesiredState(Desired(settings.models.serve, pipelines), settings.node.state)
        worker = settings.worker
        options = {"provider": worker.provider, "threads": worker.threads, "slots": worker.slots, "context_tokens": worker.context_tokens}
        self._reconciler = Reconciler(self._desired, self._catalog.find, self._prepare, self._workers, options)
        self._served.reconciler = self._reconciler
        self._desired.on_change = self._reconciler.wake
        self._reconciler.on_change = self._changed
        self._in_flight: Callable[[], int] = lambda: 0
        self._standby = self._make_standby(journal)
        workers = list(self._workers.values())
        self._view = View(settings, self._desired, self._reconciler, self._standby, workers, self._history, lambda: self._uplink)
        self._events = Events(node=settings.node.id, outbox=outbox, clock=boot_clock_s)
        orders = Orders(self._desired, self._reconciler, self._catalog.find, self._view.diagnostics())
        self._commands = Commands(
            node=settings.node.id,
            journal=journal,
            handlers=orders.handlers(),
            lease=self._standby,
            clock=boot_clock_s,
            clock_is_synced=clock_is_synced,
            report_fault=self._events.fault,
        )
        self._session = self._make_session(journal, outbox) if settings.mqtt.host else None

    async def run(self, listener: socket.socket, key_digests: tuple[bytes, ...], demo: RemoteSwitch | None) -> None:
        services = Services(
            node_id=self.settings.node.id,
            node=self._view,
            gate=self._standby.may_serve,
            text=TextService(self._served.resolve),
            vision=self._vision,
            demo=demo,
            key_digests=key_digests,
        )
        app = create_app(services, CollectorRegistry())
        self._in_flight = lambda: app.in_flight.count
        server = HttpServer(app.asgi, listener, stop_s=DRAIN_S, closing=app.closing)
        self._view.endpoint = _endpoint(self.settings, server.port)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.run)
            for worker in self._workers.values():
                tasks.start_soon(worker.run)
            tasks.start_soon(self._reconciler.run)
            tasks.start_soon(self._standby.run)
            tasks.start_soon(self._commands.run)
            tasks.start_soon(self._publish_camera_events)
            if self._session is not None:
                tasks.start_soon(self._session.run)
            await server.started.wait()
            logger.info("node %s serves %s", self.settings.node.id, server.url)
            # Not after MQTT: a node without its network must start too.
            notify("READY=1")
            tasks.start_soon(self._feed_watchdog)
            await _until_told_to_stop()
            notify("STOPPING=1")
            logger.info("stopping")
            server.stop()
            await app.in_flight.wait_idle(DRAIN_S)
            for worker in self._workers.values():
                tasks.start_soon(worker.stop)
            tasks.cancel_scope.cancel()

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
            policy=policy,
            probe_interval_s=primary.interval_s,
            probe_timeout_s=primary.timeout_s + 1.0,
        )

    def _make_session(self, journal: Journal, outbox: Outbox) -> Session:
        mqtt = self.settings.mqtt
        broker = Broker(
            mqtt.host,
            mqtt.port,
            client_id=self.settings.node.id,
            username=mqtt.username or None,
            password_file=mqtt.password_file,
            ca_file=mqtt.ca,
            certificate_file=mqtt.certificate,
            key_file=mqtt.key,
        )
        sensors = open_sensors()
        reports = Reports(
            standing=self._standby.standing,
            meta=lambda: self._view.meta(self._commands.ops),
            state=self._view.state_body,
            heartbeat=lambda: sensors().heartbeat(HttpLoad(inflight=self._in_flight())),
        )
        return Session(
            broker=broker,
            journal=journal,
            outbox=outbox,
            events=self._events,
            commands=self._commands,
            reports=reports,
            clock=boot_clock_s,
            clock_is_synced=clock_is_synced,
            on_uplink=self._uplink_changed,
            on_desired=self._desired_came,
            settings=SessionSettings(mqtt.heartbeat_active_s, mqtt.heartbeat_standby_s),
        )

    # ── wires ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _prepare(self, manifest: Manifest, progress: Progress) -> Built:
        built = await self.prepare(manifest, progress)
        if manifest.task != "detection":
            await to_thread.run_sync(self._served.load, manifest.name, built.folder)
        return built

    async def _probe_primary(self) -> bool:
        primary = self.settings.primary
        key = (await anyio.Path(primary.key_file).read_text()).strip() if primary.key_file else ""
        return (await probe_primary(self._client, primary.url, primary.model, key, primary.timeout_s)).is_good

    def _health(self) -> Health:
        """Ready with one model to ask; degraded when nothing is on its way to becoming one."""
        states = self._reconciler.actual.models
        wanted = self._desired.value.models
        if not wanted or any(isinstance(states.get(model), Serving) for model in wanted):
            return "ready"
        is_hopeless = all(isinstance(states.get(model), Broken) for model in wanted) or isinstance(self._workers["text"].state, Quarantined)
        return "degraded" if is_hopeless else "starting"

    def _changed(self) -> None:
        self._standby.health_changed()
        if self._session is not None:
            self._session.state_changed()

    def _worker_changed(self, name: WorkerName, state: WorkerState) -> None:
        if not isinstance(state, WorkerRunning):
            cause = getattr(state, "cause", None)
            if cause is not None:
                self._history.add("worker", "error", f"{name} worker: {cause.text}")
        else:
            self._history.add("worker", "info", f"{name} worker runs as process {state.pid}")
        self._reconciler.wake()
        self._changed()

    def _mode_changed(self, before: ModeState, after: ModeState) -> None:
        if before.mode != after.mode:
            reason = after.reason.replace("_", " ")
            self._history.add("mode", "info", f"{after.mode}, was {before.mode}: {reason}")
            uplink = "up" if self._uplink and self._uplink.broker_is_up else "down"
            notify(f"STATUS=mode={after.mode} epoch={after.lease.epoch} uplink={uplink}")
        if self._session is not None:
            self._session.state_changed()

    def _uplink_changed(self, uplink: Uplink) -> None:
        self._uplink = uplink
        broker = "broker up" if uplink.broker_is_up else "broker lost"
        coordinator = "coordinator up" if uplink.coordinator_is_online else "no coordinator"
        self._history.add("uplink", "info" if uplink.broker_is_up else "warning", f"{broker}, {coordinator}")
        self._standby.uplink_changed(broker_is_up=uplink.broker_is_up, coordinator_is_online=uplink.coordinator_is_online)

    def _desired_came(self, document: DesiredDocument) -> None:
        pipelines = {one.id: {**one.settings, "id": one.id, "source": one.source, "model": one.model} for one in document.pipelines}
        if self._desired.take(document.rev, tuple(model.name for model in document.models), pipelines):
            logger.info("desired state of revision %d taken", document.rev)

    def _vision_reported(self, report: object, payload: bytes) -> None:
        self._vision.on_report(report, payload)  # type: ignore[arg-type]  # every Report is an object

    def _camera_event(self, event: CameraEvent) -> None:
        if event.kind == "camera":
            self._history.add("camera", "info", f"{event.pipeline}: {event.data.get('state')} {event.data.get('message') or ''}".rstrip())
            self._changed()
        try:
            self._camera_in.send_nowait(event)
        except anyio.WouldBlock:  # drop and count: the broker's side is slower than the cameras
            self._dropped_camera_events += 1

    async def _publish_camera_events(self) -> None:
        """Detections are data on their own topic; what happens to a camera is an event that must not be lost."""
        async for event in self._camera_out:
            body = {"v": 1, "kind": event.kind, **event.data}
            if event.kind == "camera":
                await self._events.publish("pipeline", "info", {"pipeline": event.pipeline, **event.data})
            elif self._session is not None:
                await self._session.publish_data(event.pipeline, json.dumps(body).encode())

    async def _feed_watchdog(self) -> None:
        interval_s = watchdog_interval_s()
        while interval_s is not None:
            notify("WATCHDOG=1")
            await anyio.sleep(interval_s)


def _key_digests(file: Path | None) -> tuple[bytes, ...]:
    """SHA-256 of each API key, in hex, one a line (`printf %s KEY | sha256sum`): the keys themselves are nowhere on the device."""
    if file is None:
        return ()
    try:
        digests = tuple(bytes.fromhex(line) for line in file.read_text().split())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"http.keys_file {file}: {error}; give one SHA-256 in hex a line: printf %s KEY | sha256sum") from error
    if not digests or any(len(digest) != 32 for digest in digests):
        raise ConfigurationError(f"http.keys_file {file} must hold SHA-256 digests of 64 hex digits, one a line: printf %s KEY | sha256sum")
    return digests


def _endpoint(settings: Settings, port: int) -> Endpoint:
    """Where the balancer reaches this node: as configured, else the address that leads to the broker."""
    if settings.http.advertise:
        host, _, given = settings.http.advertise.rpartition(":")
        return Endpoint(host=host.strip("[]"), port=int(given))
    host = settings.http.host
    if host in ("0.0.0.0", "::") and settings.mqtt.host:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((settings.mqtt.host, settings.mqtt.port))  # sends nothing: only asks for the route
            host = str(probe.getsockname()[0])
    return Endpoint(host=host, port=port)


async def _until_told_to_stop() -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            return
