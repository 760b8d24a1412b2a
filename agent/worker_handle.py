"""What the daemon's parts need of a supervised worker (agent/supervision/worker.py)."""

from __future__ import annotations

from typing import Protocol

from agent.supervision.state import Running, WorkerState
from agent.worker_protocol import Done, Request


class WorkerHandle(Protocol):
    @property
    def state(self) -> WorkerState: ...

    async def call(self, message: Request, payload: bytes = b"", deadline_s: float = 30.0) -> tuple[Done, bytes]: ...


def incarnation_of(worker: WorkerHandle) -> int | None:
    """Which of its processes answers now; None while none does."""
    return worker.state.incarnation if isinstance(worker.state, Running) else None
