"""The node at one moment, for people and clients (HTTP) and for the coordinator (MQTT): reads everything, changes nothing."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import anyio
from pydantic import JsonValue

from agent.config import Settings
from agent.desired import DesiredState
from agent.history import History
from agent.http.collaborators import ModelView, NodeSnapshot, PipelineView, WorkerView
from agent.link.session import Uplink
from agent.model_view import build_view, model_view, reported
from agent.plan import wanted_models
from agent.protocol.messages import Backup, Endpoint, MetaBody, ModelState, PipelineState, StateBody
from agent.reconcile import Reconciler
from agent.standby import Standby
from agent.state import Asleep, Broken, Refused, Renewal, Serving
from agent.state import ModelState as LocalModelState
from agent.state import Running as PipelineRunning
from agent.supervision.state import BackingOff, Quarantined, Running, Starting, WorkerState
from agent.supervision.worker import Worker
from agent.telemetry.generic import Reading
from agent.telemetry.sensors import hardware, software
from models.manifest import manifest_digest


class View:
    """Answers from memory, at once. `uplink` is None on a node without a broker; `reading` is the last look at the device; a revision
    counts as applied once all of it runs."""

    def __init__(
        self,
        settings: Settings,
        desired: DesiredState,
        reconciler: Reconciler,
        standby: Standby,
        workers: Sequence[Worker],
        history: History,
        uplink: Callable[[], Uplink | None],
        reading: Callable[[], Reading],
    ) -> None:
        self._settings = settings
        self._desired = desired
        self._reconciler = reconciler
        self._standby = standby
        self._workers = workers
        self._history = history
        self._uplink = uplink
        self._reading = reading
        self._hardware, self._software = hardware(), software()
        self._started_s = anyio.current_time()
        self._applied_revision = 0
        self.endpoint: Endpoint | None = None

    # ── for people and clients ────────────────────────────────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> NodeSnapshot:
        standing = self._standby.standing()
        return NodeSnapshot(
            node=self._settings.node.id,
            version=version("hotspare"),
            mode=standing.mode,
            reason=self._standby.state.reason,
            epoch=standing.epoch,
            uptime_s=anyio.current_time() - self._started_s,
            lease_kind=standing.lease_kind,
            lease_left_s=standing.lease_left_s,
            uplink=self._uplink_word(),
            models=self.models(),
            pipelines=tuple(_pipeline(name, settings, self._reported(name)) for name, settings in self._desired.value.pipelines.items()),
            workers=tuple(_worker(worker) for worker in self._workers),
            events=self._history.events[-50:],
            device=self._reading(),
        )

    def models(self) -> tuple[ModelView, ...]:
        actual = self._reconciler.actual
        return tuple(self._model(name, state, actual.renewals.get(name)) for name, state in actual.models.items())

    def _model(self, name: str, state: LocalModelState, renewal: Renewal | None) -> ModelView:
        reconciler = self._reconciler
        unloads: dict[str, int] = {reason: count for (model, reason), count in reconciler.uses.unloads.items() if model == name}
        return model_view(name, state, renewal, reconciler.manifest(name), self._aliases(name), unloads, reconciler.uses.reloads[name])

    def _aliases(self, name: str) -> tuple[str, ...]:
        manifest = self._reconciler.manifest(name)
        configured = (alias for alias, meant in self._settings.models.aliases.items() if meant.model == name)
        return (*(manifest.aliases if manifest else ()), *configured)

    def _uplink_word(self) -> str:
        uplink = self._uplink()
        if uplink is None:
            return "standalone"
        return "connected" if uplink.broker_is_up else "disconnected"

    def _reported(self, pipeline: str) -> Mapping[str, Any]:
        """What the worker says of a pipeline, or what reconciliation knows while it is not running."""
        actual = self._reconciler.actual
        state = actual.pipelines.get(pipeline)
        if isinstance(state, Refused):
            return {"state": "failed", "message": state.message}
        model = str(self._desired.value.pipelines.get(pipeline, {}).get("model"))
        model_state = actual.models.get(model)
        if isinstance(model_state, Broken):
            return {"state": "failed", "message": f"its model {model} does not serve: {model_state.message}"}
        statuses = (worker.status for worker in self._workers)
        reports = [status.pipelines[pipeline] for status in statuses if status is not None and pipeline in status.pipelines]
        return reports[0] if reports else {"state": "starting"}

    # ── for the coordinator ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def meta(self, ops: tuple[str, ...]) -> MetaBody:
        node = self._settings.node
        return MetaBody(
            agent=version("hotspare"),
            hw=self._hardware,
            sw={"python": platform.python_version(), "machine": platform.machine(), **self._software},
            ops=ops,
            endpoint=self.endpoint,
            backup=Backup(weight=node.weight, max_rps=node.max_requests_per_s),
        )

    def state_body(self) -> StateBody:
        desired, actual = self._desired.value, self._reconciler.actual
        is_serving = all(isinstance(actual.models.get(model), Serving | Asleep) for model in wanted_models(desired))
        if is_serving and all(isinstance(actual.pipelines.get(pipeline), PipelineRunning) for pipeline in desired.pipelines):
            self._applied_revision = desired.revision
        return StateBody(
            desired_rev=desired.revision,
            applied_rev=self._applied_revision,
            models=tuple(self._model_state(name, state, actual.renewals.get(name)) for name, state in list(actual.models.items())[:128]),
            pipelines=tuple(_pipeline_state(name, self._reported(name)) for name in list(desired.pipelines)[:128]),
        )

    def _model_state(self, name: str, state: LocalModelState, renewal: Renewal | None) -> ModelState:
        manifest = self._reconciler.manifest(name)
        return ModelState.model_validate(
            {
                "name": name,
                "status": reported(state),
                "task": manifest.task if manifest else None,
                "digest": f"sha256:{manifest_digest(manifest)}" if manifest else None,
                "message": build.message[:2000] or None if (build := build_view(state, renewal)) else None,
            }
        )

    def diagnostics(self) -> dict[str, Callable[[], JsonValue]]:
        """Fixed parts of the node's own facts; no prompt, no secret, no file of the user's choice."""
        return {
            "workers": lambda: [f"{one.name}: {type(one.state).__name__} {dict(one.restarts)}" for one in self._workers],
            "models": lambda: {name: type(state).__name__ for name, state in self._reconciler.models.items()},
            "journal": lambda: [f"{event.at} {event.kind}: {event.message}" for event in self._history.events[-20:]],
        }


def _pipeline(name: str, settings: Mapping[str, Any], reported: Mapping[str, Any]) -> PipelineView:
    return PipelineView(
        id=name,
        model=str(settings.get("model", "")),
        status=str(reported.get("state", "starting")),
        fps=float(reported.get("fps") or 0.0),
        latency_ms=float(reported.get("latency_ms") or 0.0),
        objects=reported.get("objects") or {},
        counts=reported.get("counts") or {},
        truth=reported.get("truth"),
        message=str(reported.get("message") or ""),
    )


def _pipeline_state(name: str, reported: Mapping[str, Any]) -> PipelineState:
    words: dict[str, Literal["running", "starting", "stopped", "failed", "paused"]] = {
        "streaming": "running",
        "failed": "failed",
        "paused": "paused",
    }
    status = words.get(str(reported.get("state")), "starting")
    fps = reported.get("fps")
    message = str(reported.get("message") or "")[:2000]
    return PipelineState(
        id=name,
        status=status,
        fps=round(fps, 1) if isinstance(fps, int | float) and math.isfinite(fps) else None,
        is_slowed=bool(reported.get("is_slowed")),
        message=message or None,
    )


def _worker(worker: Worker) -> WorkerView:
    status, pid, message = _worker_words(worker.state)
    memory_bytes = worker.status.memory_bytes if worker.status else 0
    return WorkerView(worker.name, status, pid, sum(worker.restarts.values()), memory_bytes, message)


def _worker_words(state: WorkerState) -> tuple[str, int | None, str]:
    match state:
        case Running(pid=pid):
            return "running", pid, ""
        case Starting():
            return "starting", None, ""
        case BackingOff(cause=cause):
            return "restarting", None, cause.text
        case Quarantined(cause=cause):
            return "quarantined", None, cause.text
        case _:
            return "stopped", None, ""
