"""Keeps text models warm: around each request, and before work that may come at any moment."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from agent.errors import AgentError
from agent.plan import wanted_models
from agent.reconcile import Reconciler
from agent.state import WORKER_OF_TASK, Asleep, Serving
from agent.worker_handle import WorkerHandle
from agent.worker_protocol import Encode, Generate

logger = logging.getLogger(__name__)

WARM_UP_S = 30.0


class Warmth:
    """`worker`: the one of text models."""

    def __init__(self, reconciler: Reconciler, worker: WorkerHandle) -> None:
        self._reconciler = reconciler
        self._worker = worker

    @contextmanager
    def using(self, model: str) -> Iterator[None]:
        """Around a request: its model is loaded if it sleeps, and stays in memory."""
        with self._reconciler.uses.using(model):
            self.rouse(model)
            yield

    def rouse(self, model: str) -> None:
        self._reconciler.rouse(model)

    async def warm_up(self) -> None:
        """Load the text models that sleep, and run those that rested, so that what the kernel took away from them meanwhile is in memory
        again. Returns after WARM_UP_S at the latest; nothing is raised."""
        async with anyio.create_task_group() as tasks:
            for model in wanted_models(self._reconciler.desired.value):
                manifest = self._reconciler.manifest(model)
                if manifest and WORKER_OF_TASK[manifest.task] == "text" and self._reconciler.uses.has_rested(model):
                    tasks.start_soon(self._warm_up, model, manifest.task)

    async def _warm_up(self, model: str, task: str) -> None:
        reconciler = self._reconciler
        with self.using(model), anyio.move_on_after(WARM_UP_S):
            while isinstance(state := reconciler.models.get(model), Asleep) and state.is_roused:
                await reconciler.next_change()
            if not isinstance(state, Serving):
                return
            is_generator = task == "generation"
            shortest = Generate(0, model, max_tokens=2, deadline_s=WARM_UP_S) if is_generator else Encode(0, model, (1,), WARM_UP_S)
            try:
                await self._worker.call(shortest, bytes(4), WARM_UP_S)
            except AgentError as error:
                logger.warning("model %s was not warmed up: %s", model, error)
