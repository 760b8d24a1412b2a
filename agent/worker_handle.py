"""What the daemon's parts need of a supervised worker (agent/supervision/worker.py)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from agent.errors import AgentError
from agent.state import WORKER_OF_TASK
from agent.supervision.state import Running, WorkerState
from agent.worker_protocol import CloseModel, Done, OpenModel, Request
from models.manifest import Manifest
from models.record import to_mapping

logger = logging.getLogger(__name__)

OPEN_DEADLINE_S = 300.0
CLOSE_DEADLINE_S = 30.0


class WorkerHandle(Protocol):
    @property
    def state(self) -> WorkerState: ...

    async def call(self, message: Request, payload: bytes = b"", deadline_s: float = 30.0) -> tuple[Done, bytes]: ...


def incarnation_of(worker: WorkerHandle) -> int | None:
    """Which of its processes answers now; None while none does."""
    return worker.state.incarnation if isinstance(worker.state, Running) else None


async def open_model(worker: WorkerHandle, manifest: Manifest, folder: Path, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Facts of the engine in `folder`, which answers from now on. Raises AgentError, ProtocolError."""
    message = OpenModel(0, manifest.name, to_mapping(manifest), str(folder), dict(options))
    done, _ = await worker.call(message, deadline_s=OPEN_DEADLINE_S)
    logger.info("model %s is served by the %s worker from %s", manifest.name, WORKER_OF_TASK[manifest.task], folder.name)
    return done.result


async def close_model(worker: WorkerHandle, model: str) -> None:
    try:
        await worker.call(CloseModel(0, model), deadline_s=CLOSE_DEADLINE_S)
    except AgentError as error:
        logger.warning("model %s was not closed: %s", model, error)
