"""The other end for tests: sends commands as a coordinator does and keeps all that nodes say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
from pydantic import JsonValue

from agent.link.broker import Broker, LinkLost, Received
from agent.link.mqtt import Link
from agent.protocol import topics
from agent.protocol.messages import Command, Event, Presence, Result, State
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import FINAL_STATUSES, Wire, decode, encode, wire_now
from tests.agent.link.node import NODE

M = TypeVar("M", bound=Wire)
DEADLINE_S = 15.0


class Watcher:
    def __init__(self, link: Link) -> None:
        self.link = link
        self.heard: list[Received] = []
        self._arrived = anyio.Event()

    async def listen(self) -> None:
        try:
            async for message in self.link.messages():
                self.link.acknowledge(message)
                self.heard.append(message)
                self._arrived.set()
                self._arrived = anyio.Event()
        except LinkLost:
            return

    async def until(self, question: Callable[[], M | None]) -> M:
        """The first answer that is not None, asked again whenever something arrives."""
        with anyio.fail_after(DEADLINE_S):
            while (answer := question()) is None:
                await self._arrived.wait()
            return answer

    def all(self, kind: str, message: type[M]) -> list[M]:
        return [decode(message, received.payload) for received in self.heard if topics.parse(received.topic).kind == kind]

    async def presence(self, fits: Callable[[Presence], bool]) -> Presence:
        return await self.until(lambda: next(filter(fits, self.all("presence", Presence)), None))

    async def state(self, fits: Callable[[State], bool]) -> State:
        return await self.until(lambda: next(filter(fits, self.all("state", State)), None))

    async def event(self, event_class: str, skip: int = 0) -> Event:
        return await self.until(lambda: next(iter([e for e in self.all("evt", Event) if e.event_class == event_class][skip:]), None))

    def results(self, command_id: str) -> list[Result]:
        return [result for result in self.all("res", Result) if result.id == command_id]

    async def final(self, command_id: str) -> Result:
        return await self.until(lambda: next((r for r in self.results(command_id) if r.status in FINAL_STATUSES), None))

    async def replay(self, command_id: str) -> Result:
        return await self.until(lambda: next((r for r in self.results(command_id) if r.replayed), None))

    async def send(self, command: Command, *, retain: bool = False, expiry_s: int | None = None) -> str:
        await self.link.publish(
            topics.command(command.node, command.op), encode(command), retain=retain, expiry_s=expiry_s or round(command.deadline_s)
        )
        return command.id

    async def order(
        self, op: str, args: Mapping[str, JsonValue] | None = None, *, epoch: int | None = None, deadline_s: float = 30.0
    ) -> str:
        return await self.send(command(op, args, epoch=epoch, deadline_s=deadline_s))


def command(op: str, args: Mapping[str, JsonValue] | None = None, *, epoch: int | None = None, deadline_s: float = 30.0) -> Command:
    return Command(
        id=new_ulid(),
        op=op,
        node=NODE,
        epoch=epoch,
        issued_at=wire_now(),
        deadline_s=deadline_s,
        issuer="coord-test",
        args=dict(args or {}),
    )


@asynccontextmanager
async def watching(host: str, port: int, name: str = "watcher") -> AsyncIterator[Watcher]:
    async with Link(Broker(host, port, name, session_expiry_s=0)) as link:
        watcher = Watcher(link)
        await link.subscribe(topics.COORDINATOR_SUBSCRIPTIONS)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watcher.listen)
            yield watcher
            tasks.cancel_scope.cancel()
