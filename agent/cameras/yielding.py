"""Cameras step back while requests for text need the device: each to its own `floor_fps`, until the queue has been empty for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import anyio

from agent.errors import AgentError
from agent.supervision.state import Running, WorkerState
from agent.worker_protocol import Done, Pace, Request, Status

logger = logging.getLogger(__name__)

LOOK_S = 0.25
QUIET_S = 2.0
RETRY_S = 5.0
CALL_S = 5.0
TO_THE_FLOOR = 0.0


class VisionWorker(Protocol):
    """What is needed of agent.supervision.worker.Worker."""

    @property
    def state(self) -> WorkerState: ...
    async def call(self, message: Request, payload: bytes = b"", deadline_s: float = ...) -> tuple[Done, bytes]: ...


def text_load(status: Status | None) -> int:
    """Requests for text that run or wait, by the text worker's last report, which comes once a second."""
    models = () if status is None else status.models.values()
    return sum(int(model.get(field, 0)) for model in models if model.get("task") == "generation" for field in ("running", "waiting"))


class Yielding:
    """Tells the vision worker its pace whenever that changes, and again to each of its incarnations. `load`: requests for text now."""

    def __init__(self, worker: VisionWorker, load: Callable[[], int], quiet_s: float = QUIET_S) -> None:
        self._worker = worker
        self._load = load
        self._quiet_s = quiet_s
        self._needed_s = -quiet_s
        self._told: tuple[int, float | None] = (0, None)
        self._retry_s = 0.0

    async def run(self) -> None:
        while True:
            now_s = time.monotonic()
            if self._load():
                self._needed_s = now_s
            pace = TO_THE_FLOOR if now_s - self._needed_s < self._quiet_s else None
            state = self._worker.state
            if isinstance(state, Running) and now_s >= self._retry_s:
                await self._tell(state.incarnation, pace)
            await anyio.sleep(LOOK_S)

    async def _tell(self, incarnation: int, pace: float | None) -> None:
        if self._told[0] != incarnation:
            self._told = (incarnation, None)  # a new one goes at full pace
        if self._told[1] == pace:
            return
        try:
            await self._worker.call(Pace(0, pace), deadline_s=CALL_S)
        except AgentError as error:  # it has no camera yet, or is dying: the next look tries again
            logger.debug("cameras were not told their pace: %s", error)
            self._retry_s = time.monotonic() + RETRY_S
            return
        self._told = (incarnation, pace)
        logger.debug("cameras go %s", "as configured" if pace is None else "at their floors while text is asked for")
