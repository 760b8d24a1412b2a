"""One client's request while it is answered: its body, read once, for whoever answers; and whether the client is still there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.http.outcome import KEY, answered


class ClientGone(Exception):
    """The client left before its request was complete."""


async def read_body(receive: Receive) -> bytes:
    """The whole body; the front bounds its length and time. Raises ClientGone."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


class Visit:
    """`present` is a cancel scope for work that only this client needs; `watch` ends it when the client leaves."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        self.scope = scope
        self.body = body
        self.send = send
        self.present = anyio.CancelScope()
        self._receive = receive
        self._left = anyio.Event()

    async def watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left.set()
        self.present.cancel()

    def receive(self) -> Receive:
        """`receive` for an application: the body, then the client's leaving."""
        has_body = False

        async def next_message() -> Message:
            nonlocal has_body
            if not has_body:
                has_body = True
                return {"type": "http.request", "body": self.body, "more_body": False}
            await self._left.wait()
            return {"type": "http.disconnect"}

        return next_message


class LocalRun:
    """An answer of this node in the making, kept until it is wanted. `on_first` is called when its first token is here, or its end."""

    def __init__(self, local: ASGIApp, visit: Visit, on_first: Callable[[], None]) -> None:
        self.status = 0
        self.is_good = False
        self._local = local
        self._visit = visit
        self._note = replace(answered(visit.scope))  # of its own: where another answer is given, how this one ends says nothing
        self._on_first = on_first
        self._scope = anyio.CancelScope()
        # Full: generation waits. 64 events are some seconds of tokens, enough for a race.
        self._outbox, self._inbox = anyio.create_memory_object_stream[Message](64)

    async def run(self) -> None:
        with self._scope:
            async with self._outbox:
                await self._local({**self._visit.scope, KEY: self._note}, self._visit.receive(), self._put)

    def cancel(self) -> None:
        self._scope.cancel()
        self._inbox.close()

    async def deliver(self) -> None:
        try:
            async with self._inbox:
                async for message in self._inbox:
                    await self._visit.send(message)
        finally:
            note = answered(self._visit.scope)
            note.has_failed = self._note.has_failed
            note.tokens += self._note.tokens

    async def _put(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif not self.is_good and self.status == 200 and not message.get("body", b"").startswith(b":"):  # a comment is no token
            self.is_good = True
            self._on_first()
        try:
            await self._outbox.send(message)
        except anyio.BrokenResourceError:  # nobody waits for it any more
            self._scope.cancel()
