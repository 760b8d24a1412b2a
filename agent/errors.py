"""Errors that cross component borders in the daemon; each class has a stable `code` that clients, metrics and results may carry."""

from __future__ import annotations

from typing import ClassVar

from agent.supervision.exit_cause import ExitCause


class AgentError(Exception):
    """`code` is stable, the message is for people: what happened, with which value, what to do."""

    code: ClassVar[str] = "internal"


class WorkerLost(AgentError):
    """The worker died, or could not be asked, before it had answered. Caught where the request may be given to its next incarnation."""

    code = "worker_lost"

    def __init__(self, worker: str, cause: ExitCause) -> None:
        super().__init__(f"the {worker} worker was lost: {cause.text}")
        self.worker = worker
        self.cause = cause


class WorkerRefused(AgentError):
    """The worker answered Failed; `reason` is its code (see worker_protocol.Failed). It lives on."""

    code = "worker_refused"

    def __init__(self, reason: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s
