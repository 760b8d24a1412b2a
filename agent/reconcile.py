"""Makes what is like what should be: observes, plans, carries the steps out. The only writer of the actual state."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup

from agent.desired import DesiredState
from agent.errors import AgentError, WorkerLost
from agent.plan import Close, Open, Prepare, Start, Step, Stop, plan, wanted_models
from agent.state import WORKER_OF_TASK, Absent, Actual, Broken, ModelState, Prepared, Preparing, Refused, Running, Serving, WorkerName
from agent.supervision.exit_cause import Kind
from agent.supervision.state import Running as WorkerRunning
from agent.supervision.state import WorkerState
from agent.worker_protocol import CloseModel, Done, OpenModel, ProtocolError, Request, StartPipeline, StopPipeline
from models.catalog import CatalogError
from models.manifest import Manifest
from models.record import to_mapping

logger = logging.getLogger(__name__)

TICK_S = 1.0
OPEN_DEADLINE_S = 300.0
PIPELINE_DEADLINE_S = 30.0
RETRY_BASE_S = 5.0
RETRY_CAP_S = 600.0
# A model that ends its worker while it is loaded takes the others of that worker with it: after so many deaths it has to wait.
LETHAL_OPENS = 2
LETHAL: frozenset[Kind] = frozenset({"segfault", "aborted", "out_of_memory", "hang", "exit"})

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
    """`lookup` finds a manifest, `prepare` builds a model, `engine_options` are those of every OpenModel.

    Each worker is asked for one thing at a time; the workers, and the one build, do not wait for each other.
    """

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
        self._deadly: dict[str, set[int]] = {}
        self._asked: dict[WorkerName, Step] = {}
        self._woken = anyio.Event()
        self._changed = anyio.Event()
        self.ticked_s = -math.inf
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

    def retry(self, model: str, pipeline: str = "") -> None:
        """Somebody asks for it by hand: what failed before is due now, and its back-off begins anew."""
        state, refused = self._models.get(model), self._pipelines.get(pipeline)
        if isinstance(state, Broken):
            self._models[model] = replace(state, retry_at_s=-math.inf)
        if isinstance(refused, Refused):
            self._pipelines[pipeline] = replace(refused, attempts=0, retry_at_s=-math.inf)
        self._failures.pop(model, None)
        self._deadly.pop(model, None)
        self.wake()

    async def settled(self, model: str) -> ModelState:
        """Waits until the model serves, or failed anew, or is no longer wanted (Absent). The caller sets the deadline."""
        first = self._models.get(model)
        while True:
            state = self._models.get(model)
            if model not in wanted_models(self._desired.value):
                return Absent()
            if isinstance(state, Broken) and state is not first:
                return state
            if isinstance(state, Serving) and self._is_current(model, state):
                return state
            await self._next_change()

    async def gone(self, model: str) -> None:
        """Waits until nothing is left of a model, or it is wanted again."""
        while model in self._models and model not in wanted_models(self._desired.value):
            await self._next_change()

    async def pipeline_settled(self, pipeline: str, settings: Mapping[str, Any]) -> Running | Refused:
        """Waits until the pipeline runs with these settings; Refused if it, or its model, failed anew, or others are wanted now."""
        model = str(settings.get("model"))
        first, first_model = self._pipelines.get(pipeline), self._models.get(model)
        while True:
            state, model_state = self._pipelines.get(pipeline), self._models.get(model)
            if self._desired.value.pipelines.get(pipeline) != settings:
                return Refused(settings, "a newer order took its place", 0, 0.0)
            if isinstance(state, Running) and state.settings == settings and self._runs(state):
                return state
            if isinstance(state, Refused) and state.settings == settings and state is not first:
                return state
            if isinstance(model_state, Broken) and model_state is not first_model:
                return Refused(settings, f"its model {model} does not serve: {model_state.message}", 0, 0.0)
            await self._next_change()

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            while True:
                self._woken = anyio.Event()
                self.ticked_s = anyio.current_time()
                for step in plan(self._desired.value, self.actual, anyio.current_time()):
                    self._begin(step, tasks)
                with anyio.move_on_after(TICK_S):
                    await self._woken.wait()

    def _begin(self, step: Step, tasks: TaskGroup) -> None:
        worker = self._needed(step)
        if worker is not None:
            if worker not in self._asked:  # else it is planned again when the worker has answered
                self._asked[worker] = step
                tasks.start_soon(self._ask, worker, step)
            return
        match step:
            case Prepare(model=model):
                self._set(model, Preparing())
                tasks.start_soon(self._prepare_model, model)
            case Close(model=model):
                self._forget(model)
            case Stop(pipeline=pipeline):
                self._pipelines.pop(pipeline, None)
                self._announce()
            case _:
                raise AssertionError(f"{step} asks no worker")

    def _needed(self, step: Step) -> WorkerName | None:
        """The worker that has to be asked for a step."""
        match step:
            case Open(model=model):
                return self._worker_of(model)
            case Close(model=model):
                state, worker = self._models.get(model), self._worker_of(model)
                is_held = isinstance(state, Serving) and self._is_current(model, state)
                return worker if is_held or (worker is not None and self._asked.get(worker) == Open(model)) else None
            case Stop(pipeline=pipeline):
                running = self._pipelines.get(pipeline)
                return "vision" if isinstance(running, Running) and self._runs(running) else None
            case Start():
                return "vision"
            case _:
                return None

    async def _ask(self, name: WorkerName, step: Step) -> None:
        worker = self._workers[name]
        incarnation = incarnation_of(worker)
        is_done = False
        try:
            if incarnation is not None:
                match step:
                    case Open(model=model):
                        is_done = await self._open(model, worker, incarnation)
                    case Close(model=model):
                        is_done = await self._close(model, worker)
                    case Start(pipeline=pipeline):
                        is_done = await self._start(pipeline, worker, incarnation)
                    case Stop(pipeline=pipeline):
                        is_done = await self._stop(pipeline, worker)
        finally:
            del self._asked[name]
        if is_done:  # else the worker is lost: its next state wakes us
            self.wake()

    async def _prepare_model(self, model: str) -> None:
        def progress(phase: str, fraction: float) -> None:
            self._set(model, Preparing(phase, fraction))

        try:
            manifest = self._lookup(model)
            self._manifests[model] = manifest
            built = await self._prepare(manifest, progress)
        except (CatalogError, PreparationFailed) as error:
            self._break(model, str(error))
        except Exception as error:  # files and networks that nobody vouches for: what they find is one model's end, not the node's
            logger.exception("preparing model %s failed", model)
            self._break(model, f"{type(error).__name__}: {error}")
        else:
            logger.info("model %s is ready in %s", model, built.folder)
            self._set(model, Prepared(built.folder, built.record))
        self.wake()

    async def _open(self, model: str, worker: WorkerHandle, incarnation: int) -> bool:
        state = self._models.get(model)
        if not isinstance(state, Prepared | Serving):
            return True
        manifest = self._manifests[model]
        message = OpenModel(0, model, to_mapping(manifest), str(state.folder), dict(self._engine_options))
        try:
            done, _ = await worker.call(message, deadline_s=OPEN_DEADLINE_S)
        except WorkerLost as error:
            self._blame(model, incarnation, error)
            return False
        except (AgentError, ProtocolError) as error:  # it lives and said no
            self._break(model, str(error))
            return True
        logger.info("model %s is served by the %s worker", model, WORKER_OF_TASK[manifest.task])
        self._set(model, Serving(state.folder, state.record, incarnation, done.result))
        return True

    async def _close(self, model: str, worker: WorkerHandle) -> bool:
        try:
            await worker.call(CloseModel(0, model), deadline_s=PIPELINE_DEADLINE_S)
        except AgentError as error:
            logger.warning("model %s was not closed: %s", model, error)
        self._forget(model)
        return True

    async def _start(self, pipeline: str, worker: WorkerHandle, incarnation: int) -> bool:
        settings = self._desired.value.pipelines.get(pipeline)
        if settings is None:
            return True
        try:
            await worker.call(StartPipeline(0, pipeline, dict(settings)), deadline_s=PIPELINE_DEADLINE_S)
        except WorkerLost:
            return False
        except (AgentError, ProtocolError) as error:
            earlier = self._pipelines.get(pipeline)
            attempts = earlier.attempts + 1 if isinstance(earlier, Refused) else 1
            logger.warning("pipeline %s does not start: %s", pipeline, error)
            self._pipelines[pipeline] = Refused(settings, str(error), attempts, _retry_at(attempts))
        else:
            self._pipelines[pipeline] = Running(settings, incarnation)
        self._announce()
        return True

    async def _stop(self, pipeline: str, worker: WorkerHandle) -> bool:
        try:
            await worker.call(StopPipeline(0, pipeline), deadline_s=PIPELINE_DEADLINE_S)
        except AgentError as error:
            logger.warning("pipeline %s was not stopped: %s", pipeline, error)
        self._pipelines.pop(pipeline, None)
        self._announce()
        return True

    def _worker_of(self, model: str) -> WorkerName | None:
        manifest = self._manifests.get(model)
        return None if manifest is None else WORKER_OF_TASK[manifest.task]

    def _is_current(self, model: str, state: Serving) -> bool:
        worker = self._worker_of(model)
        return worker is not None and incarnation_of(self._workers[worker]) == state.incarnation

    def _runs(self, state: Running) -> bool:
        return state.incarnation == incarnation_of(self._workers["vision"])

    def _blame(self, model: str, incarnation: int, lost: WorkerLost) -> None:
        """A death is the supervisor's business, and the model is opened again; not for ever, if it is the model that kills."""
        if lost.cause.kind not in LETHAL:
            return
        deaths = self._deadly.setdefault(model, set())
        deaths.add(incarnation)
        if len(deaths) >= LETHAL_OPENS:
            self._break(model, f"its worker died {len(deaths)} times while it was loaded: {lost.cause.text}", RETRY_CAP_S)
            del self._deadly[model]

    def _break(self, model: str, message: str, at_least_s: float = 0.0) -> None:
        attempts = self._failures[model] = self._failures.get(model, 0) + 1
        logger.error("model %s does not serve: %s", model, message)
        self._set(model, Broken(message, attempts, max(_retry_at(attempts), anyio.current_time() + at_least_s)))

    def _set(self, model: str, state: ModelState) -> None:
        if isinstance(state, Serving):
            self._failures.pop(model, None)
            self._deadly.pop(model, None)
        self._models[model] = state
        self._announce()

    def _forget(self, model: str) -> None:
        for kept in (self._models, self._manifests, self._failures, self._deadly):
            kept.pop(model, None)
        self._announce()

    async def _next_change(self) -> None:
        with anyio.move_on_after(TICK_S):  # what is wanted changes without an announcement
            await self._changed.wait()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
        self.on_change()


def _retry_at(attempts: int) -> float:
    delay_s = min(RETRY_CAP_S, RETRY_BASE_S * 2.0 ** min(attempts, 10))
    return anyio.current_time() + random.uniform(delay_s / 2, delay_s)
