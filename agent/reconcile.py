"""Makes what is like what should be: observes, plans, carries the steps out. The only writer of the actual state."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup
from typing_extensions import assert_never

from agent.desired import DesiredState
from agent.errors import AgentError
from agent.plan import Close, Open, Prepare, Start, Step, Stop, plan
from agent.state import WORKER_OF_TASK, Actual, Broken, ModelState, Prepared, Preparing, Refused, Running, Serving, WorkerName
from agent.supervision.state import Running as WorkerRunning
from agent.supervision.state import WorkerState
from agent.worker_protocol import CloseModel, Done, OpenModel, Request, StartPipeline, StopPipeline
from models.catalog import CatalogError
from models.manifest import Manifest
from models.record import to_mapping

logger = logging.getLogger(__name__)

TICK_S = 1.0
OPEN_DEADLINE_S = 300.0
PIPELINE_DEADLINE_S = 30.0
RETRY_BASE_S = 5.0
RETRY_CAP_S = 600.0

Progress = Callable[[str, float], None]


class WorkerHandle(Protocol):
    """What reconciliation needs of a supervised worker (agent/supervision/worker.py)."""

    @property
    def state(self) -> WorkerState: ...

    async def call(self, message: Request, payload: bytes = b"", deadline_s: float = 30.0) -> tuple[Done, bytes]: ...


def incarnation_of(worker: WorkerHandle) -> int | None:
    """Which of its processes answers now; None while none does."""
    return worker.state.incarnation if isinstance(worker.state, WorkerRunning) else None


@dataclass(frozen=True, slots=True)
class Built:
    """A model ready to be opened: its engine folder and what is recorded of it."""

    folder: Path
    record: Mapping[str, Any]


class PreparationFailed(Exception):
    """A model could not be fetched, converted or verified; the message is for people."""


Preparation = Callable[[Manifest, Progress], Awaitable[Built]]


class Reconciler:
    """`lookup` finds a manifest, `prepare` builds a model, `engine_options` are those of every OpenModel."""

    def __init__(
        self,
        desired: DesiredState,
        lookup: Callable[[str], Manifest],
        prepare: Preparation,
        workers: Mapping[WorkerName, WorkerHandle],
        engine_options: Mapping[str, Any],
    ) -> None:
        self._desired = desired
        self._lookup = lookup
        self._prepare = prepare
        self._workers = workers
        self._engine_options = engine_options
        self._models: dict[str, ModelState] = {}
        self._pipelines: dict[str, Running | Refused] = {}
        self._manifests: dict[str, Manifest] = {}
        self._failures: dict[str, int] = {}
        self._woken = anyio.Event()
        self._changed = anyio.Event()
        self.on_change: Callable[[], None] = lambda: None

    @property
    def actual(self) -> Actual:
        """A model that its worker's last process held, but not this one, is only prepared."""
        running = {name: incarnation_of(worker) for name, worker in self._workers.items()}
        worker_of = {name: WORKER_OF_TASK[manifest.task] for name, manifest in self._manifests.items()}
        alive = {name: incarnation for name, incarnation in running.items() if incarnation is not None}
        models = {
            name: Prepared(state.folder, state.record) if isinstance(state, Serving) and not self._is_current(name, state) else state
            for name, state in self._models.items()
        }
        return Actual(models, dict(self._pipelines), alive, worker_of)

    def manifest(self, model: str) -> Manifest | None:
        return self._manifests.get(model)

    def wake(self) -> None:
        """Look again now; called when a worker starts or dies and when the desired state changes."""
        self._woken.set()

    async def settled(self, model: str) -> ModelState:
        """Waits until the model serves, or could not be made to: then returns its state. The caller sets the deadline."""
        first = self._models.get(model)
        while True:
            state = self._models.get(model)
            if isinstance(state, Broken) and state is not first:
                return state
            if isinstance(state, Serving) and self._is_current(model, state):
                return state
            await self._changed.wait()

    async def gone(self, model: str) -> None:
        while model in self._models:
            await self._changed.wait()

    async def pipeline_settled(self, pipeline: str, settings: Mapping[str, Any]) -> Running | Refused:
        while True:
            state = self._pipelines.get(pipeline)
            if state is not None and state.settings == settings:
                return state
            await self._changed.wait()

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            while True:
                self._woken = anyio.Event()
                for step in plan(self._desired.value, self.actual, anyio.current_time()):
                    await self._carry_out(step, tasks)
                with anyio.move_on_after(TICK_S):
                    await self._woken.wait()

    async def _carry_out(self, step: Step, tasks: TaskGroup) -> None:
        match step:
            case Prepare(model=model):
                self._set(model, Preparing())
                tasks.start_soon(self._prepare_model, model)
            case Open(model=model):
                await self._open(model)
            case Close(model=model):
                await self._close(model)
            case Start(pipeline=pipeline):
                await self._start(pipeline)
            case Stop(pipeline=pipeline):
                await self._stop(pipeline)
            case _:
                assert_never(step)

    async def _prepare_model(self, model: str) -> None:
        def progress(phase: str, fraction: float) -> None:
            self._set(model, Preparing(phase, fraction))

        try:
            manifest = self._lookup(model)
            self._manifests[model] = manifest
            built = await self._prepare(manifest, progress)
        except (CatalogError, PreparationFailed) as error:
            self._break(model, str(error))
        else:
            logger.info("model %s is ready in %s", model, built.folder)
            self._set(model, Prepared(built.folder, built.record))
        self.wake()

    async def _open(self, model: str) -> None:
        state = self._models[model]
        if not isinstance(state, Prepared | Serving):
            return
        manifest = self._manifests[model]
        worker = self._workers[WORKER_OF_TASK[manifest.task]]
        incarnation = incarnation_of(worker)
        message = OpenModel(0, model, to_mapping(manifest), str(state.folder), dict(self._engine_options))
        try:
            done, _ = await worker.call(message, deadline_s=OPEN_DEADLINE_S)
        except AgentError as error:
            if incarnation_of(worker) == incarnation:  # it lives and said no; a death is the supervisor's business, and we open again
                self._break(model, str(error))
            return
        if incarnation is not None:
            logger.info("model %s is served by the %s worker", model, WORKER_OF_TASK[manifest.task])
            self._set(model, Serving(state.folder, state.record, incarnation, done.result))

    async def _close(self, model: str) -> None:
        state = self._models.get(model)
        if isinstance(state, Serving) and self._is_current(model, state):
            worker = self._workers[WORKER_OF_TASK[self._manifests[model].task]]
            try:
                await worker.call(CloseModel(0, model), deadline_s=PIPELINE_DEADLINE_S)
            except AgentError as error:
                logger.warning("model %s was not closed: %s", model, error)
        self._models.pop(model, None)
        self._manifests.pop(model, None)
        self._announce()

    async def _start(self, pipeline: str) -> None:
        settings = self._desired.value.pipelines[pipeline]
        worker = self._workers["vision"]
        incarnation = incarnation_of(worker)
        try:
            await worker.call(StartPipeline(0, pipeline, dict(settings)), deadline_s=PIPELINE_DEADLINE_S)
        except AgentError as error:
            if incarnation_of(worker) == incarnation:
                earlier = self._pipelines.get(pipeline)
                attempts = earlier.attempts + 1 if isinstance(earlier, Refused) else 1
                logger.warning("pipeline %s does not start: %s", pipeline, error)
                self._pipelines[pipeline] = Refused(settings, str(error), attempts, _retry_at(attempts))
                self._announce()
            return
        if incarnation is not None:
            self._pipelines[pipeline] = Running(settings, incarnation)
            self._announce()

    async def _stop(self, pipeline: str) -> None:
        state = self._pipelines.pop(pipeline)
        worker = self._workers["vision"]
        if isinstance(state, Running) and state.incarnation == incarnation_of(worker):
            try:
                await worker.call(StopPipeline(0, pipeline), deadline_s=PIPELINE_DEADLINE_S)
            except AgentError as error:
                logger.warning("pipeline %s was not stopped: %s", pipeline, error)
        self._announce()

    def _is_current(self, model: str, state: Serving) -> bool:
        manifest = self._manifests.get(model)
        return manifest is not None and incarnation_of(self._workers[WORKER_OF_TASK[manifest.task]]) == state.incarnation

    def _break(self, model: str, message: str) -> None:
        attempts = self._failures[model] = self._failures.get(model, 0) + 1
        logger.error("model %s does not serve: %s", model, message)
        self._set(model, Broken(message, attempts, _retry_at(attempts)))

    def _set(self, model: str, state: ModelState) -> None:
        if isinstance(state, Serving):
            self._failures.pop(model, None)
        self._models[model] = state
        self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
        self.on_change()


def _retry_at(attempts: int) -> float:
    delay_s = min(RETRY_CAP_S, RETRY_BASE_S * 2.0 ** min(attempts, 10))
    return anyio.current_time() + random.uniform(delay_s / 2, delay_s)
