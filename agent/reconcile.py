"""Makes what is like what should be: observes, plans, carries the steps out. The only writer of the actual state."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import TaskGroup

from agent.desired import DesiredState
from agent.engine_options import engine_options
from agent.errors import AgentError, WorkerLost, WorkerRefused
from agent.patience import CANCELLED, renewal_at_s, retry_at_s
from agent.pipelines import Pipelines
from agent.plan import Close, Open, Prepare, Renew, RestPolicy, Sleep, Start, Step, Stop, Swap, plan
from agent.preparation import Built, NotVerified, Preparation, PreparationFailed, Progress, Wish, is_verified
from agent.protocol.wire import Severity
from agent.state import (
    WORKER_OF_TASK,
    Actual,
    Asleep,
    Broken,
    ModelState,
    NotRenewed,
    Prepared,
    Preparing,
    Renewal,
    Renewed,
    Renewing,
    Serving,
    SleepReason,
    WorkerName,
)
from agent.trust import LETHAL_OPENS, EngineTrust
from agent.uses import Uses
from agent.worker_handle import WorkerHandle, close_model, incarnation_of, open_model
from agent.worker_protocol import ProtocolError
from models.catalog import CatalogError
from models.engines.free_memory import available_bytes
from models.manifest import Manifest

logger = logging.getLogger(__name__)

TICK_S = 1.0


class Reconciler:
    """`lookup` finds a manifest, `preparation` makes engines, `node_options` are those of every engine, `told` is what a pipeline's
    settings become on their way to the worker, `rest` when models that nobody asks leave memory.

    Each worker is asked for one thing at a time; the workers, and the one build, do not wait for each other.
    """

    def __init__(
        self,
        desired: DesiredState,
        lookup: Callable[[str], Manifest],
        preparation: Preparation,
        workers: Mapping[WorkerName, WorkerHandle],
        node_options: Mapping[str, Any],
        accepts_unverified: bool = False,
        told: Callable[[str, Mapping[str, Any]], dict[str, Any]] = lambda pipeline, settings: dict(settings),
        rest: RestPolicy = RestPolicy(),  # noqa: B008 - frozen
        free_bytes: Callable[[], int | None] = available_bytes,
    ) -> None:
        self.desired = desired
        self._lookup = lookup
        self._preparation = preparation
        self._workers = workers
        self._node_options = node_options
        self._accepts_unverified = accepts_unverified
        self.pipelines = Pipelines(workers["vision"], told)
        self.uses = Uses(rest, free_bytes)
        self._models: dict[str, ModelState] = {}
        self._renewals: dict[str, Renewal] = {}
        self._wishes: dict[str, Wish] = {}
        self._failures: dict[str, int] = {}
        self._coming: dict[str, Wish] = {}
        self._trust = EngineTrust()
        self._asked: dict[WorkerName, Step] = {}
        self._builds: dict[str, anyio.CancelScope] = {}
        self._woken = anyio.Event()
        self._changed = anyio.Event()
        self.ticked_s = -math.inf
        self.on_change: Callable[[], None] = lambda: None
        self.on_note: Callable[[Severity, str, str], None] = lambda severity, model, text: None

    @property
    def models(self) -> dict[str, ModelState]:
        """A model that its worker's last process held, but not this one, is only prepared. Asked several times for each request."""
        return {name: self._seen(name, state) for name, state in self._models.items()}

    @property
    def actual(self) -> Actual:
        """With what the kernel says of memory, where somebody cares for it: not for what is asked with every request."""
        running = {name: incarnation_of(worker) for name, worker in self._workers.items()}
        worker_of = {name: WORKER_OF_TASK[wish.manifest.task] for name, wish in self._wishes.items()}
        alive = {name: at for name, at in running.items() if at is not None}
        return Actual(self.models, self.pipelines.states, alive, worker_of, dict(self._renewals), self.uses.now, self.uses.free_bytes())

    def manifest(self, model: str) -> Manifest | None:
        wish = self._wishes.get(model)
        return None if wish is None else wish.manifest

    def wake(self) -> None:
        """Look again now; called when a worker starts or dies and when the desired state changes."""
        self._woken.set()

    def retry(self, model: str, pipeline: str = "") -> None:
        """Somebody asks for it by hand: what failed before is due now, and its back-off begins anew."""
        state = self._models.get(model)
        self.pipelines.retry(pipeline)
        if isinstance(state, Broken):
            self._models[model] = replace(state, retry_at_s=-math.inf)
        if isinstance(renewal := self._renewals.get(model), NotRenewed):
            self._renewals[model] = replace(renewal, attempts=0, retry_at_s=-math.inf)
        if isinstance(state, Serving) and not pipeline:
            self._models[model] = replace(state, is_current=False)  # what it was made from may have changed
        if isinstance(state, Asleep):
            self._models[model] = replace(state, is_current=False, is_roused=True)
        self._failures.pop(model, None)
        self._trust.forget(model)
        self.wake()

    def cancel(self, model: str) -> bool:
        """End the build of a model; what serves goes on serving. Whether there was one. It is not begun again before `retry`."""
        scope = self._builds.get(model)
        if scope is not None:
            scope.cancel()
        return scope is not None

    def rouse(self, model: str) -> None:
        """Somebody waits for a model: load it if it sleeps."""
        if isinstance(state := self._models.get(model), Asleep) and not state.is_roused:
            self._models[model] = replace(state, is_roused=True)
            self.wake()

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            while True:
                self._woken = anyio.Event()
                self.ticked_s = anyio.current_time()
                steps = plan(self.desired.value, self.actual, anyio.current_time(), self.uses.policy)
                self.uses.is_crowded = False
                for step in steps:
                    self._begin(step, tasks)
                with anyio.move_on_after(TICK_S):
                    await self._woken.wait()

    def _begin(self, step: Step, tasks: TaskGroup) -> None:
        if (worker := self._needed(step)) is not None:
            if worker not in self._asked:  # else it is planned again when the worker has answered
                self._asked[worker] = step
                tasks.start_soon(self._ask, worker, step)
            return
        match step:
            case Prepare(model=model):
                self._builds[model] = anyio.CancelScope()
                self._set(model, Preparing())
                tasks.start_soon(self._prepare, model)
            case Renew(model=model):
                state = self._models[model]
                if isinstance(state, Serving):
                    self._models[model] = replace(state, is_current=False)
                self._builds[model] = anyio.CancelScope()
                self._set_renewal(model, Renewing())
                tasks.start_soon(self._renew, model)
            case Close(model=model):
                self._forget(model)
            case Stop(pipeline=pipeline):
                self.pipelines.forget(pipeline)
                self._announce()
            case _:
                raise AssertionError(f"{step} asks no worker")

    def _needed(self, step: Step) -> WorkerName | None:
        """The worker that has to be asked for a step."""
        match step:
            case Open(model=model) | Swap(model=model) | Sleep(model=model):
                return self._worker_of(model)
            case Close(model=model):
                state, worker = self._models.get(model), self._worker_of(model)
                is_held = isinstance(state, Serving) and self._is_held(model, state)
                is_opening = worker is not None and self._asked.get(worker) in (Open(model), Swap(model))
                return worker if is_held or is_opening else None
            case Stop(pipeline=pipeline):
                return "vision" if self.pipelines.must_be_asked_to_stop(pipeline) else None
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
                    case Swap(model=model):
                        is_done = await self._swap(model, worker, incarnation)
                    case Close(model=model):
                        is_done = await self._close(model, worker)
                    case Sleep(model=model, reason=reason):
                        is_done = await self._sleep(model, worker, reason)
                    case Start(pipeline=pipeline):
                        settings = self.desired.value.pipelines.get(pipeline)
                        is_done = settings is None or await self.pipelines.start(pipeline, settings, incarnation)
                        self._announce()
                    case Stop(pipeline=pipeline):
                        is_done = await self.pipelines.stop(pipeline)
                        self._announce()
        finally:
            del self._asked[name]
        if is_done:  # else the worker is lost: its next state wakes us
            self.wake()

    async def _prepare(self, model: str) -> None:
        built = await self._make(model, self._preparation.prepare, self._wishes, lambda *done: self._set(model, Preparing(*done)))
        if isinstance(built, Built):
            logger.info("model %s is ready in %s", model, built.folder)
            self._set(model, Prepared(built.folder, built.record, built.is_current))
        else:
            self._break(model, built)
        self.wake()

    async def _renew(self, model: str) -> None:
        built = await self._make(model, self._preparation.renew, self._coming, lambda *done: self._set_renewal(model, Renewing(*done)))
        state = self._models.get(model)
        if not isinstance(state, Serving | Prepared):
            self._renewals.pop(model, None)
        elif isinstance(built, PreparationFailed):
            self._leave(model, built)
        elif built.folder != state.folder:
            self._set_renewal(model, Renewed(built.folder, built.record))
        else:
            self._renewals.pop(model, None)
            self._wishes[model] = self._coming.pop(model)
            self._set(model, replace(state, is_current=True))
        self.wake()

    async def _make(
        self, model: str, make: Callable[[Wish, Progress], Awaitable[Built]], wishes: dict[str, Wish], progress: Progress
    ) -> Built | PreparationFailed:
        with self._builds[model]:
            try:
                build, state = self.desired.value.builds.get(model, {}), self._models.get(model)
                serving = state.folder if isinstance(state, Serving) else None
                wish = wishes[model] = Wish(self._lookup(model), build, self._trust.distrusted(model), serving)
                return await make(wish, progress)
            except CatalogError as error:
                return PreparationFailed(str(error))
            except PreparationFailed as error:
                return error
            except Exception as error:  # files and networks that nobody vouches for: what they find is one model's end, not the node's
                logger.exception("preparing model %s failed", model)
                return PreparationFailed(f"{type(error).__name__}: {error}")
            finally:
                del self._builds[model]
        return PreparationFailed(CANCELLED, "cancelled")

    async def _open(self, model: str, worker: WorkerHandle, incarnation: int) -> bool:
        state = self._models.get(model)
        if not isinstance(state, Prepared | Serving | Asleep):
            return True
        try:
            details = await self._opened(self._wishes[model], state.folder, state.record, worker)
        except WorkerLost as error:
            if self._trust.is_deadly(model, state.folder, incarnation, error):
                self._trust.distrust(model, state.folder)
                text = f"its worker died {LETHAL_OPENS} times while it was loaded: {error.cause.text}"
                self._break(model, PreparationFailed(text, "lethal"))
            return False
        except (AgentError, ProtocolError) as error:  # it lives and said no
            if isinstance(state, Asleep) and isinstance(error, WorkerRefused) and error.reason == "memory":
                self._sleep_on(model, state, error)
                return True
            self._trust.distrust(model, state.folder)
            self._break(model, PreparationFailed(str(error)))
            return True
        self._set(model, Serving(state.folder, state.record, incarnation, details, state.is_current))
        if isinstance(state, Asleep):
            self.uses.reloads[model] += 1
            self.on_note("info", model, "is in memory again")
        return True

    async def _sleep(self, model: str, worker: WorkerHandle, reason: SleepReason) -> bool:
        """Asleep before it is closed: whoever asks meanwhile has it opened again."""
        state = self._models.get(model)
        if not isinstance(state, Serving) or self.uses.is_at_work(model):
            return True
        self._set(model, Asleep(state.folder, state.record, reason, state.is_current))
        why = self.uses.unloaded(model, reason)
        logger.info("model %s is taken out of memory: %s", model, why)
        self.on_note("info", model, f"is taken out of memory: {why}")
        await close_model(worker, model)
        return True

    def _sleep_on(self, model: str, state: Asleep, refusal: WorkerRefused) -> None:
        """It was asked for, and has no room: another that rests may make some before somebody asks again."""
        self.uses.is_crowded = True
        logger.warning("model %s stays out of memory: %s", model, refusal)
        self.on_note("warning", model, f"stays out of memory: {refusal}")
        self._set(model, replace(state, is_roused=False))

    async def _swap(self, model: str, worker: WorkerHandle, incarnation: int) -> bool:
        renewed = self._renewals.get(model)
        if not isinstance(renewed, Renewed):
            return True
        try:
            details = await self._opened(self._coming[model], renewed.folder, renewed.record, worker)
        except WorkerLost as error:
            if self._trust.is_deadly(model, renewed.folder, incarnation, error):
                text = f"its worker died {LETHAL_OPENS} times while the new engine was loaded: {error.cause.text}"
                self._leave(model, PreparationFailed(text))
            return False
        except (AgentError, ProtocolError) as error:
            self._leave(model, PreparationFailed(f"the new engine cannot be opened: {error}"))
            return True
        self._renewals.pop(model, None)
        self._wishes[model] = self._coming.pop(model)
        self._set(model, Serving(renewed.folder, renewed.record, incarnation, details))
        self.on_note("info", model, f"served by its new engine {renewed.folder.name}")
        return True

    async def _opened(self, wish: Wish, folder: Path, record: Mapping[str, Any], worker: WorkerHandle) -> Mapping[str, Any]:
        if not is_verified(record) and not (self._accepts_unverified or wish.build.get("accept_unverified")):
            raise NotVerified(wish.manifest.name, folder, record)
        return await open_model(worker, wish.manifest, folder, engine_options(self._node_options, record))

    async def _close(self, model: str, worker: WorkerHandle) -> bool:
        await close_model(worker, model)
        self._forget(model)
        return True

    def _seen(self, model: str, state: ModelState) -> ModelState:
        if not isinstance(state, Serving | Prepared | Asleep):
            return state
        is_current = state.is_current and self._wishes[model].build == self.desired.value.builds.get(model, {})
        if isinstance(state, Asleep) or (isinstance(state, Serving) and self._is_held(model, state)):
            return replace(state, is_current=is_current)
        return Prepared(state.folder, state.record, is_current)

    def _worker_of(self, model: str) -> WorkerName | None:
        wish = self._wishes.get(model)
        return None if wish is None else WORKER_OF_TASK[wish.manifest.task]

    def _is_held(self, model: str, state: Serving) -> bool:
        worker = self._worker_of(model)
        return worker is not None and incarnation_of(self._workers[worker]) == state.incarnation

    def _break(self, model: str, failure: PreparationFailed) -> None:
        attempts = self._failures[model] = self._failures.get(model, 0) + 1
        logger.error("model %s does not serve: %s", model, failure)
        self.on_note("error", model, f"does not serve: {failure}")
        self._set(model, Broken(str(failure), attempts, retry_at_s(attempts, failure)))

    def _leave(self, model: str, failure: PreparationFailed) -> None:
        """The engine that serves stays; what was to take its place is not tried again soon, or not at all."""
        attempts = self._failures[model] = self._failures.get(model, 0) + 1
        logger.warning("model %s goes on being served by the engine before: %s", model, failure)
        self.on_note("warning", model, f"goes on being served by the engine before: {failure}")
        self._set_renewal(model, NotRenewed(str(failure), attempts, renewal_at_s(attempts, failure)))

    def _set(self, model: str, state: ModelState) -> None:
        if isinstance(state, Serving) and state.is_current:
            self._failures.pop(model, None)
            self._trust.forget(model)
        if isinstance(state, Serving):
            self.uses.begin(model)
        self._models[model] = state
        self._announce()

    def _set_renewal(self, model: str, renewal: Renewal) -> None:
        self._renewals[model] = renewal
        self._announce()

    def _forget(self, model: str) -> None:
        self.cancel(model)
        self._trust.forget(model)
        for kept in (self._models, self._renewals, self._wishes, self._coming, self._failures):
            kept.pop(model, None)
        self.uses.forget(model)
        self._announce()

    async def next_change(self) -> None:
        with anyio.move_on_after(TICK_S):  # what is wanted changes without an announcement
            await self._changed.wait()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
        self.on_change()
