"""Answers that last: server-sent events, multipart pictures, and work that ends when its client leaves."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from anyio import CancelScope
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agent.errors import AgentError
from agent.http.collaborators import Frame, Limits, ServiceFailure
from agent.http.errors import ApiError, answer_of, failed
from agent.http.outcome import answered

LOG = logging.getLogger(__name__)

Result = TypeVar("Result")
Item = TypeVar("Item")
Emit = Callable[[Any], Awaitable[None]]
BOUNDARY = b"hotspare-frame"


class ClientLeft(Exception):
    """The client closed the connection before its answer was complete."""


async def all_of(*calls: Callable[[], Awaitable[Result]]) -> list[Result]:
    """The results of `calls`, which run at the same time. The first expected failure ends the others and is raised bare."""
    results: dict[int, Result] = {}
    failures: list[ApiError | AgentError] = []

    async def run(index: int, call: Callable[[], Awaitable[Result]], scope: CancelScope) -> None:
        try:
            results[index] = await call()
        except (ApiError, AgentError) as failure:
            failures.append(failure)
            scope.cancel()

    async with anyio.create_task_group() as tasks:
        for index, call in enumerate(calls):
            tasks.start_soon(run, index, call, tasks.cancel_scope)
    if failures:
        raise failures[0]
    return [results[index] for index in range(len(calls))]


async def unless_left(request: Request, call: Callable[[], Awaitable[Result]], most_s: float) -> Result:
    """The result of `call`, which is cancelled when the client leaves (ClientLeft) or its time, `most_s` at most, is over (ApiError)."""
    timeout_s = answered(request.scope).left_s(most_s)
    outcome: list[Result] = []
    failure: ApiError | AgentError | None = None
    has_left = False

    async def watch(scope: CancelScope) -> None:
        nonlocal has_left
        await _left(request.receive)
        has_left = True
        scope.cancel()

    with anyio.move_on_after(timeout_s) as deadline:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, tasks.cancel_scope)
            try:
                outcome.append(await call())
            except (ApiError, AgentError) as error:
                failure = error
            tasks.cancel_scope.cancel()
    if failure:
        raise failure
    if outcome:
        return outcome[0]
    if has_left:
        raise ClientLeft
    if deadline.cancelled_caught:
        raise failed(ServiceFailure("deadline", f"no answer within {timeout_s:.3g} s"))
    raise ClientLeft


def event(value: Any) -> bytes:
    return b"data: " + json_bytes(value) + b"\n\n"


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True)
class EventForm:
    """How an answer is written that may be waited for.

    written   one value that was emitted
    broken    a failure after the head, which has said 200; empty: the connection is broken off, for nobody must take it for an answer
    end       what comes last
    waiting   sent now and then while there is nothing else
    """

    written: Callable[[Any], bytes] = event
    broken: Callable[[ApiError], bytes] = lambda error: event(error.body())
    end: bytes = b"data: [DONE]\n\n"
    waiting: bytes = b": keep-alive\n\n"
    media_type: str = "text/event-stream; charset=utf-8"


CHUNKS = EventForm()
# Emits once. JSON may begin with empty lines, and DeepSeek's whole answers do while they wait.
WHOLE = EventForm(json_bytes, lambda error: b"", b"", b"\n", "application/json")


class EventStream(Response):
    """Server-sent events from `write`, which emits JSON values; or, in the form WHOLE, the one value as a body.

    The head is held back until the first event, so that what fails before it has a status of its own and a balancer can go elsewhere;
    after `head_hold_s` it is sent, and comments or empty lines keep the connection alive as DeepSeek's do. A later failure is an error
    event, or the end of the connection.
    """

    def __init__(
        self, write: Callable[[Emit], Awaitable[None]], limits: Limits, on_left: Callable[[], None], form: EventForm = CHUNKS
    ) -> None:
        self._write = write
        self._form = form
        self._on_left = on_left
        self._limits = limits
        self.status_code = 200
        self.background = None
        self.init_headers({"Content-Type": form.media_type, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outbox, inbox = anyio.create_memory_object_stream[bytes | ApiError](16)  # full: generation waits for the client
        is_complete = False

        def left() -> None:
            if not is_complete:  # the server says "disconnect" after the last byte of a complete answer too
                self._on_left()

        async with outbox, inbox, anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_when_left, receive, tasks.cancel_scope, left)
            tasks.start_soon(self._produce, outbox, answered(scope).left_s(self._limits.answer_s))
            await self._deliver(inbox, scope, receive, send)
            is_complete = True
            tasks.cancel_scope.cancel()

    async def _produce(self, outbox: MemoryObjectSendStream[bytes | ApiError], within_s: float) -> None:
        async def emit(value: Any) -> None:
            await outbox.send(self._form.written(value))

        async with outbox:
            try:
                with anyio.fail_after(within_s):
                    await self._write(emit)
                if self._form.end:
                    await outbox.send(self._form.end)
            except ApiError as error:
                await outbox.send(error)
            except AgentError as failure:
                await outbox.send(failed(failure))
            except TimeoutError:
                await outbox.send(failed(ServiceFailure("deadline", f"the answer was not complete in its time, {within_s:.3g} s")))

    async def _deliver(self, inbox: MemoryObjectReceiveStream[bytes | ApiError], scope: Scope, receive: Receive, send: Send) -> None:
        has_head = False
        wait_s = math.inf if answered(scope).can_wait else self._limits.head_hold_s  # no connection of a batch must be kept alive
        while True:
            item: bytes | ApiError = self._form.waiting
            try:
                with anyio.move_on_after(wait_s):
                    item = await inbox.receive()
            except anyio.EndOfStream:
                break
            if isinstance(item, ApiError):
                if not has_head:
                    await answer_of(item, scope)(scope, receive, send)
                    return
                answered(scope).has_failed = True  # the head said 200
                item = self._form.broken(item)
                if not item:
                    return
            if not has_head:
                is_all = self._form is WHOLE and item != WHOLE.waiting
                length = [(b"content-length", b"%d" % len(item))] if is_all else []
                await send({"type": "http.response.start", "status": 200, "headers": [*self.raw_headers, *length]})
                has_head, wait_s = True, self._limits.keep_alive_s
            await send({"type": "http.response.body", "body": item, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class PictureStream(Response):
    """Motion JPEG, parts of multipart/x-mixed-replace: until the viewer leaves, the camera ends, `closing`, or a send takes `send_s`."""

    def __init__(self, frames: AsyncIterator[Frame], closing: anyio.Event, on_end: Callable[[], None], send_s: float = 20.0) -> None:
        self._frames = frames
        self._closing = closing
        self._on_end = on_end
        self._send_s = send_s
        self.status_code = 200
        self.background = None
        self.raw_headers = [
            (b"content-type", b"multipart/x-mixed-replace; boundary=" + BOUNDARY),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_cancel_when_left, receive, tasks.cancel_scope, None)
                tasks.start_soon(self._cancel_when_closing, tasks.cancel_scope)
                await self._deliver(scope, receive, send)
                tasks.cancel_scope.cancel()
        finally:
            self._on_end()

    async def _deliver(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_head = False
        try:
            async with closing(self._frames) as frames:
                async for frame in frames:
                    if not has_head:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        has_head = True
                    await self._part(send, frame)
        except (AgentError, TimeoutError) as error:
            LOG.info("picture stream ended: %s", error)
            if not has_head and isinstance(error, AgentError):
                await failed(error).response()(scope, receive, send)
                return
        if not has_head:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _cancel_when_closing(self, scope: CancelScope) -> None:
        await self._closing.wait()
        scope.cancel()

    async def _part(self, send: Send, frame: Frame) -> None:
        head = b"--%s\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\nX-Sequence: %d\r\n\r\n"
        part = head % (BOUNDARY, len(frame.jpeg), frame.sequence) + frame.jpeg + b"\r\n"
        with anyio.fail_after(self._send_s):
            await send({"type": "http.response.body", "body": part, "more_body": True})


@asynccontextmanager
async def closing(items: AsyncIterator[Item]) -> AsyncIterator[AsyncIterator[Item]]:
    """`items`, closed at the end where it is a generator: a suspended one would keep its request alive until collected."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()


async def _cancel_when_left(receive: Receive, scope: CancelScope, on_left: Callable[[], None] | None) -> None:
    await _left(receive)
    if on_left:
        on_left()
    scope.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
