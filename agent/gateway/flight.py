"""Equal requests in flight are asked once: the first one's answer is read by all, live, and goes on while any of them is there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
from starlette.types import Message, Receive, Send

from agent.http.outcome import Answered

AHEAD = 256  # messages that the answer may be ahead of its fastest reader: then it waits, as it would for one client
SHARED_BYTES = 16 << 20  # a longer answer takes no new readers


class Flight:
    """One answer in the making. `note` is the leader's: who answers it. `left` is set when no reader is there any more."""

    def __init__(self, note: Answered) -> None:
        self.note = note
        self.left = anyio.Event()
        self._messages: list[Message] = []
        self._places: dict[int, int] = {}
        self._bytes = 0
        self._is_over = False
        self._moved = anyio.Event()
        self._readers = 0

    def answer(self) -> tuple[int, bytes]:
        """Status and body of an answer that is over; status 0 where it never began or did not end well."""
        starts = [message["status"] for message in self._messages if message["type"] == "http.response.start"]
        is_whole = bool(starts) and self._bytes < SHARED_BYTES and not self._messages[-1].get("more_body", False)
        return (starts[0] if is_whole else 0), b"".join(message.get("body", b"") for message in self._messages)

    @property
    def is_joinable(self) -> bool:
        return not self._is_over and not self.left.is_set() and self._bytes < SHARED_BYTES

    async def put(self, message: Message) -> None:
        """`send` of the one who answers."""
        self._messages.append(message)
        self._bytes += len(message.get("body", b""))
        self._wake()
        while self._places and len(self._messages) - max(self._places.values()) > AHEAD:
            await self._moved.wait()

    def end(self) -> None:
        self._is_over = True
        self._wake()

    async def read(self, send: Send) -> bool:
        """Give all of it to one client, from the beginning. False: it ended before its head."""
        self._readers += 1
        reader = self._readers
        self._places[reader] = 0
        try:
            while True:
                place = self._places[reader]
                if place == len(self._messages):
                    if self._is_over:
                        return place > 0
                    await self._moved.wait()
                    continue
                message = self._messages[place]
                await send(message)
                self._places[reader] = place + 1
                self._wake()
        finally:
            del self._places[reader]
            self._wake()
            if not self._places:
                self.left.set()

    def receive(self, body: bytes) -> Receive:
        """`receive` for the one who answers: the body, then the leaving of the last reader."""
        has_body = False

        async def next_message() -> Message:
            nonlocal has_body
            if not has_body:
                has_body = True
                return {"type": "http.request", "body": body, "more_body": False}
            await self.left.wait()
            return {"type": "http.disconnect"}

        return next_message

    def _wake(self) -> None:
        moved, self._moved = self._moved, anyio.Event()
        moved.set()


async def fly(flight: Flight, answer: Callable[[], Awaitable[None]]) -> None:
    """Make the answer of a flight; it ends however `answer` ends, so that nobody waits for ever, and when nobody waits any more."""
    try:
        async with anyio.create_task_group() as tasks:

            async def ends_with_readers() -> None:
                await flight.left.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(ends_with_readers)
            await answer()
            flight.end()
            tasks.cancel_scope.cancel()
    finally:
        flight.end()
