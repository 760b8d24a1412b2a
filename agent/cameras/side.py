"""The daemon's side of the cameras in one place, for agent/main.py to wire: live pictures, what is kept, what is told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio

from agent.cameras.broadcast import Broadcast
from agent.cameras.configured import ConfigurationWatch
from agent.cameras.home_assistant import Device
from agent.cameras.images import Images
from agent.cameras.keeper import EventKeeper
from agent.cameras.media import Media
from agent.cameras.orders import CameraOrders, CameraRefused
from agent.cameras.retention import DAY_S, Keep
from agent.cameras.store import EventStore
from agent.cameras.yielding import Yielding, text_load
from agent.config import EventSettings, HomeAssistantSettings, Settings
from agent.desired import DesiredState
from agent.history import History
from agent.link.events import Events
from agent.link.session import Session
from agent.protocol.wire import Severity
from agent.reconcile import Reconciler
from agent.state import Running as PipelineRunning
from agent.supervision.state import Running, WorkerState
from agent.supervision.worker import Worker
from agent.vision import VisionService
from agent.worker_protocol import CameraEvent, Report
from models.catalog import CatalogError
from models.manifest import DetectionManifest, Manifest

logger = logging.getLogger(__name__)

SWITCHES_MAX = 64


class CameraSide:
    """Made before the worker is, for that reports to it; `connect` and, where there is a broker, `broadcast_to` complete it before anything
    runs. `on_change` is called when a camera changed its state."""

    vision: VisionService
    orders: CameraOrders
    _yielding: Yielding

    def __init__(
        self,
        settings: EventSettings,
        store: EventStore,
        state: Path,
        history: History,
        clock_is_synced: Callable[[], bool],
        on_change: Callable[[], None],
    ) -> None:
        self._history = history
        self._state = state
        self._on_change = on_change
        self._broadcast: Broadcast | None = None
        self._watch: ConfigurationWatch | None = None
        self._switch_in, self._switch_out = anyio.create_memory_object_stream[tuple[str, bool]](SWITCHES_MAX)
        media = Media(settings.media or state / "media")
        self.keeper = EventKeeper(store, media, keep_of(settings), self.note, clock_is_synced, age_s_of=self._age_s_of)

    def connect(
        self, worker: Worker, text: Worker, desired: DesiredState, reconciler: Reconciler, lookup: Callable[[str], Manifest]
    ) -> None:
        """`text`: whose requests the cameras of `worker` step back for."""
        self.vision = VisionService(worker, self._event)
        self._yielding = Yielding(worker, lambda: text_load(text.status))
        self.orders = CameraOrders(desired, reconciler, lookup)
        self._reconciler = reconciler
        self._lookup = lookup

    def broadcast_to(self, node: str, events: Events, session: Session, wanted: HomeAssistantSettings, url: Callable[[], str]) -> None:
        """`url`: where people reach the node's page, empty while nobody knows."""
        prefix, memory = wanted.prefix, self._state / "home_assistant.json"
        devices = partial(self._devices, node, version("hotspare"), url)
        images = Images(node, session, _Pictures(self.vision, self.orders, self._reconciler), wanted.image_s, wanted.image_idle_s)
        self._broadcast = Broadcast(node, events, session, self._reports, devices, prefix, images, memory)

    def _reports(self) -> list[dict[str, Any]]:
        """Of every camera that is wanted, also while its worker or its model is not there."""
        told = {str(report["id"]): report for report in self.vision.cameras()}
        return [told.get(camera, {"id": camera, "state": "starting"}) for camera in self.orders.settings()]

    def _devices(self, node: str, agent: str, url: Callable[[], str]) -> list[Device]:
        return [
            Device(node, camera, agent, settings, self._labels(str(settings.get("model"))), url())
            for camera, settings in self.orders.settings().items()
        ]

    def _age_s_of(self, camera: str) -> float | None:
        keep_days = self.orders.settings().get(camera, {}).get("keep_days")
        return None if keep_days is None else float(keep_days) * DAY_S

    def _labels(self, model: str) -> tuple[str, ...]:
        try:
            manifest = self._lookup(model)
        except CatalogError:  # its pipeline says so
            return ()
        return manifest.detection.labels if isinstance(manifest, DetectionManifest) else ()

    def follow(self, file: Path, settings: Settings, check: Callable[[Settings], Settings], desired: DesiredState) -> None:
        self._watch = ConfigurationWatch(file, settings, check, desired, partial(self._history.add, "configuration"))

    def switched(self, camera: str, is_on: bool) -> None:
        """Home Assistant resumes or pauses a camera; carried out in turn, and what comes in a flood is dropped."""
        try:
            self._switch_in.send_nowait((camera, is_on))
        except anyio.WouldBlock:
            logger.warning("camera %s is not switched: %d orders wait already", camera, SWITCHES_MAX)

    async def _carry_out_switches(self) -> None:
        async for camera, is_on in self._switch_out:
            try:
                if camera not in self.orders.settings():
                    raise CameraRefused("unknown_camera", "there is no such camera")
                await self.orders.change(camera, {"enabled": is_on})
            except CameraRefused as error:
                self.note("warning", f"camera {camera} is not switched {'on' if is_on else 'off'}: {error}"[:1000])

    def parts(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        return [
            self.keeper.run,
            self._yielding.run,
            self._carry_out_switches,
            *(part.run for part in (self._broadcast, self._watch) if part is not None),
        ]

    def told(self, camera: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the worker is told of a camera: what is wanted of it, and where its clips go."""
        return {**settings, "media": str(self.keeper.media.of_camera(camera).absolute())}

    def on_report(self, report: Report, payload: bytes) -> None:
        self.vision.on_report(report, payload)

    def worker_changed(self, state: WorkerState) -> None:
        """A worker that died says no end of what it saw."""
        if not isinstance(state, Running):
            self.keeper.end_open("worker_lost")

    def _event(self, event: CameraEvent, payload: bytes) -> None:
        words = f"{event.pipeline}: {event.data.get('state')} {event.data.get('message') or ''}".rstrip()
        if event.kind == "camera":
            self._history.add("camera", "info", words)
            self._on_change()
        elif event.kind == "unreachable":
            text = f"{event.pipeline}: {event.data.get('failures')} connections in a row have failed: {event.data.get('message')}"
            self._history.add("camera", "warning", text)
        elif event.kind == "recording":
            self._history.add("recording", "warning" if event.data.get("state") == "stopped" else "info", words)
        self.keeper.offer(event, payload)
        if self._broadcast is not None:
            self._broadcast.offer(event, payload)

    def note(self, severity: Severity, text: str) -> None:
        self._history.add("camera", severity, text)
        if self._broadcast is not None:
            self._broadcast.note(severity, text)


@dataclass(frozen=True, slots=True)
class _Pictures:
    """What agent/cameras/images.py asks of the cameras."""

    vision: VisionService
    orders: CameraOrders
    reconciler: Reconciler

    def masks(self, camera: str) -> Any:
        return self.orders.settings().get(camera, {}).get("masks") or ()

    def is_as_wanted(self, camera: str) -> bool:
        state = self.reconciler.actual.pipelines.get(camera)
        wanted = self.orders.settings().get(camera)
        return isinstance(state, PipelineRunning) and self.reconciler.pipelines.runs(state) and state.settings == wanted

    async def small(self, camera: str) -> bytes:
        return await self.vision.snapshot(camera, "small")


def keep_of(settings: EventSettings) -> Keep:
    return Keep(
        settings.keep_days * DAY_S, round(settings.budget_gb * (1 << 30)), round(settings.keep_free_gb * (1 << 30)), settings.keep_count
    )
