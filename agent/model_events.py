"""What happens to models, for people on the page and for the coordinator: engines that could not be built, and those that took over."""

from __future__ import annotations

import logging

import anyio

from agent.history import History
from agent.link.events import Events
from agent.protocol.wire import Severity

logger = logging.getLogger(__name__)

WAITING = 64
TEXT_MAX = 1500


class ModelEvents:
    """`offer` never waits: beyond WAITING events the newest is dropped and said so in the log."""

    def __init__(self, events: Events, history: History) -> None:
        self._events = events
        self._history = history
        self._in, self._out = anyio.create_memory_object_stream[tuple[Severity, str, str]](WAITING)

    def offer(self, severity: Severity, model: str, text: str) -> None:
        self._history.add("model", severity, f"{model} {text}")
        try:
            self._in.send_nowait((severity, model, text))
        except anyio.WouldBlock:
            logger.warning("an event of model %s is lost: %d wait for the outbox", model, WAITING)

    async def run(self) -> None:
        async for severity, model, text in self._out:
            await self._events.publish("model", severity, {"model": model, "message": text[:TEXT_MAX]})
