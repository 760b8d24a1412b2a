"""The pipelines of the vision worker: started, stopped, and what was refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from agent.errors import AgentError, WorkerLost
from agent.patience import retry_at_s
from agent.state import PipelineState, Refused, Running
from agent.worker_handle import WorkerHandle, incarnation_of
from agent.worker_protocol import ProtocolError, StartPipeline, StopPipeline

logger = logging.getLogger(__name__)

DEADLINE_S = 30.0


class Pipelines:
    """The hands of reconciliation for cameras. `told` is what a pipeline's settings become on their way to the worker; `start` and `stop`
    say whether the worker lives and the next step may be planned."""

    def __init__(self, worker: WorkerHandle, told: Callable[[str, Mapping[str, Any]], dict[str, Any]]) -> None:
        self._worker = worker
        self._told = told
        self._states: dict[str, PipelineState] = {}

    @property
    def states(self) -> dict[str, PipelineState]:
        return dict(self._states)

    def runs(self, state: Running) -> bool:
        """Whether the worker that has started a pipeline still lives."""
        return state.incarnation == incarnation_of(self._worker)

    def must_be_asked_to_stop(self, pipeline: str) -> bool:
        state = self._states.get(pipeline)
        return isinstance(state, Running) and self.runs(state)

    def retry(self, pipeline: str) -> None:
        if isinstance(refused := self._states.get(pipeline), Refused):
            self._states[pipeline] = replace(refused, attempts=0, retry_at_s=-math.inf)

    def forget(self, pipeline: str) -> None:
        self._states.pop(pipeline, None)

    async def start(self, pipeline: str, settings: Mapping[str, Any], incarnation: int) -> bool:
        try:
            await self._worker.call(StartPipeline(0, pipeline, self._told(pipeline, settings)), deadline_s=DEADLINE_S)
        except WorkerLost:
            return False
        except (AgentError, ProtocolError) as error:
            earlier = self._states.get(pipeline)
            attempts = earlier.attempts + 1 if isinstance(earlier, Refused) else 1
            logger.warning("pipeline %s does not start: %s", pipeline, error)
            self._states[pipeline] = Refused(settings, str(error), attempts, retry_at_s(attempts))
        else:
            self._states[pipeline] = Running(settings, incarnation)
        return True

    async def stop(self, pipeline: str) -> bool:
        try:
            await self._worker.call(StopPipeline(0, pipeline), deadline_s=DEADLINE_S)
        except AgentError as error:
            logger.warning("pipeline %s was not stopped: %s", pipeline, error)
        self.forget(pipeline)
        return True
