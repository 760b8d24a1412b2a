"""The daemon's end of one worker's socket: numbers requests, pairs answers with them, keeps the order of frames."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import anyio

from agent.errors import WorkerLost, WorkerRefused
from agent.supervision.exit_cause import ExitCause
from agent.worker_protocol import (
    HEADER,
    Cancel,
    Done,
    Failed,
    OpenModel,
    Report,
    Request,
    Shutdown,
    StartPipeline,
    Tokens,
    decode_message,
    encode_frame,
    frame_lengths,
)

# The worker answers these in one long step, during which its loop gives no sign of life: loading weights, building a GPU context.
LONG_STEPS = (OpenModel, StartPipeline)


class Pending:
    """One request on its way. Tokens that nobody has taken yet are merged, so a slow reader holds at most one answer's tokens."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.outcome: Done | Failed | WorkerLost | None = None
        self.payload = b""
        self._tokens: list[int] = []
        self._logprobs: list[Any] = []
        self._cached_tokens = 0
        self._changed = anyio.Event()

    def add(self, report: Tokens) -> None:
        self._tokens.extend(report.tokens)
        self._logprobs.extend(report.logprobs)
        self._cached_tokens = report.cached_tokens
        self._changed.set()

    def end(self, outcome: Done | Failed | WorkerLost, payload: bytes = b"") -> None:
        self.outcome, self.payload = outcome, payload
        self._changed.set()

    async def news(self) -> Tokens | Done:
        """The tokens that came since the last call, or else the end. Raises WorkerLost, WorkerRefused."""
        while not self._tokens and self.outcome is None:
            self._changed = anyio.Event()
            await self._changed.wait()
        if self._tokens:
            tokens = Tokens(self.number, tuple(self._tokens), tuple(self._logprobs), self._cached_tokens)
            self._tokens, self._logprobs = [], []
            return tokens
        match self.outcome:
            case Failed(code=code, message=message, retry_after_s=retry_after_s):
                raise WorkerRefused(code, message, retry_after_s)
            case Done() as done:
                return done
            case lost:
                raise lost or RuntimeError("a request without an outcome ended")


class Connection:
    """Belongs to the event loop's thread. At most `in_flight` requests are open; one more is refused as busy."""

    def __init__(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, in_flight: int) -> None:
        self._name = name
        self._reader = reader
        self._writer = writer
        self._in_flight = in_flight
        self._pending: dict[int, Pending] = {}
        self._long: dict[int, float] = {}
        self._last = 0
        self._cause: ExitCause | None = None
        self._writing = anyio.Lock()

    def open(self) -> Pending:
        """Number a new request. Raises WorkerRefused(busy), WorkerLost."""
        if self._cause is not None:
            raise WorkerLost(self._name, self._cause)
        if len(self._pending) >= self._in_flight:
            raise WorkerRefused("busy", f"the {self._name} worker has {len(self._pending)} open requests; try again later")
        self._last += 1
        self._pending[self._last] = Pending(self._last)
        return self._pending[self._last]

    async def send(self, pending: Pending, message: Request, payload: bytes, deadline_s: float) -> None:
        """Write a request; waits while the worker does not read. Raises ProtocolError if it is too large for a frame."""
        frame = encode_frame(dataclasses.replace(message, request=pending.number), payload)
        if isinstance(message, LONG_STEPS):
            self._long[pending.number] = time.monotonic() + deadline_s
        async with self._writing:
            try:
                await self._writer.drain()  # before the write, so that no more than one frame lies above the buffer's high-water mark
            except ConnectionError:
                return  # the worker is dying: its exit, noticed elsewhere, ends this request with the cause
            self._writer.write(frame)

    def close(self, pending: Pending) -> None:
        """The caller wants no more of this request: cancel it in the worker unless it has ended. Never waits, for the caller may not."""
        self._pending.pop(pending.number, None)
        if pending.outcome is None and not self._writer.is_closing():
            self._last += 1
            self._writer.write(encode_frame(Cancel(self._last, pending.number)))

    def shut_down(self) -> None:
        """Ask the worker to end. Never waits; the exit of the process is the answer."""
        if not self._writer.is_closing():
            self._writer.write(encode_frame(Shutdown(0)))

    def is_in_long_step(self) -> bool:
        """Whether the worker may be silent because it does something that takes long, within the deadline of that."""
        now = time.monotonic()
        return any(now < until for until in self._long.values())

    async def read(self, on_report: Callable[[Report, bytes], None]) -> None:
        """Take reports until the end of the stream; those that answer no request go to `on_report`. Raises ProtocolError."""
        try:
            while True:
                json_bytes, payload_bytes = frame_lengths(await self._reader.readexactly(HEADER.size))
                message = decode_message(await self._reader.readexactly(json_bytes))
                self._take(message, await self._reader.readexactly(payload_bytes), on_report)
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    def lose(self, cause: ExitCause) -> None:
        """The worker is dead: every open request ends with WorkerLost, and the socket is closed."""
        self._cause = cause
        for pending in self._pending.values():
            if pending.outcome is None:
                pending.end(WorkerLost(self._name, cause))
        self._pending.clear()
        self._writer.close()

    def _take(self, message: Any, payload: bytes, on_report: Callable[[Report, bytes], None]) -> None:
        if not isinstance(message, (Tokens, Done, Failed)):
            on_report(message, payload)
            return
        if not isinstance(message, Tokens):
            self._long.pop(message.request, None)
        pending = self._pending.get(message.request)
        if pending is None:
            return  # cancelled in the meantime
        if isinstance(message, Tokens):
            pending.add(message)
        else:
            pending.end(message, payload)
