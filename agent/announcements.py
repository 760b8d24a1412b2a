"""What happens on the node, for people on its page and for the coordinator: engines that took over, documents that were refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import anyio
from pydantic import JsonValue

from agent.history import History
from agent.link.events import Events
from agent.protocol.wire import Severity

logger = logging.getLogger(__name__)

WAITING = 64
TEXT_MAX = 1500


class Announcements:
    """Telling never waits: beyond WAITING events the newest is dropped and said so in the log."""

    def __init__(self, events: Events, history: History) -> None:
        self._events = events
        self._history = history
        self._in, self._out = anyio.create_memory_object_stream[tuple[str, Severity, Mapping[str, JsonValue]]](WAITING)

    def model(self, severity: Severity, model: str, text: str) -> None:
        self._history.add("model", severity, f"{model} {text}")
        self._offer("model", severity, {"model": model, "message": text[:TEXT_MAX]})

    def desired(self, severity: Severity, revision: int, text: str) -> None:
        """What became of the coordinator's document of that revision."""
        self._history.add("desired", severity, f"revision {revision} {text}")
        self._offer("desired", severity, {"rev": revision, "message": text[:TEXT_MAX]})

    async def run(self) -> None:
        async for event_class, severity, data in self._out:
            await self._events.publish(event_class, severity, data)

    def _offer(self, event_class: str, severity: Severity, data: Mapping[str, JsonValue]) -> None:
        try:
            self._in.send_nowait((event_class, severity, data))
        except anyio.WouldBlock:
            logger.warning("an event of class %s is lost: %d wait for the outbox", event_class, WAITING)
