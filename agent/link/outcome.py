"""What a command's handler is and how it may end: the seam between the link and the rest of the daemon."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from pydantic import JsonValue

from agent.protocol.lease import Decision, LeaseOrder, LeaseState
from agent.protocol.wire import ErrorCode


class CommandFailed(Exception):
    """Raised by a handler: it tried. `code` is one of the protocol's; `output` goes into the result."""

    def __init__(self, code: ErrorCode, message: str, *, is_retryable: bool = False, output: Mapping[str, JsonValue] | None = None) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.is_retryable = is_retryable
        self.output = dict(output or {})


class CommandRejected(CommandFailed):
    """Raised by a handler before it changed anything."""


class Progress(Protocol):
    """Reports `fraction` in 0…1 and a short word for what is going on. Calls within a second of the last are dropped."""

    async def __call__(self, fraction: float | None = None, step: str | None = None) -> None: ...


Output = dict[str, JsonValue]
Handler = Callable[[Any, Progress], Awaitable[Output]]


class LeaseHolder(Protocol):
    """Who keeps the lease in memory. The journal stores what `decide` accepts before `adopt` makes it so (L2)."""

    @property
    def lease(self) -> LeaseState: ...

    def decide(self, order: LeaseOrder) -> Decision: ...

    def adopt(self, lease: LeaseState) -> None: ...

    async def carry_out(self, order: LeaseOrder, progress: Progress) -> Output: ...
