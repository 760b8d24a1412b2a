"""From the cameras to the broker: detections are data for now or never, what happens to a camera is an event that must not be lost."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable

import anyio

from agent.link.broker import PublishRefused
from agent.link.events import Events
from agent.protocol.wire import Severity
from agent.worker_protocol import CameraEvent

logger = logging.getLogger(__name__)

WAITING = 256


class Broadcast:
    """`offer` never waits: what the broker is too slow for is dropped and counted. `publish_data` sends one payload of a pipeline."""

    def __init__(self, events: Events, publish_data: Callable[[str, bytes], Awaitable[None]]) -> None:
        self._events = events
        self._publish_data = publish_data
        self._in, self._out = anyio.create_memory_object_stream[CameraEvent](WAITING)
        self.lost = 0

    def note(self, severity: Severity, text: str) -> None:
        """Something that no camera in particular does, such as a disk that takes no events."""
        self.offer(CameraEvent("", "note", {"severity": severity, "message": text}))

    def offer(self, event: CameraEvent, payload: bytes = b"") -> None:
        try:
            self._in.send_nowait(event)
        except anyio.WouldBlock:
            self._lose("the broker is slower than the cameras")

    async def run(self) -> None:
        async for event in self._out:
            try:
                if event.kind in ("camera", "recording"):
                    await self._events.publish("pipeline", "info", {"pipeline": event.pipeline, "kind": event.kind, **event.data})
                elif event.kind == "note":
                    await self._events.publish("pipeline", event.data["severity"], {"message": event.data["message"]})
                else:
                    await self._publish_data(event.pipeline, json.dumps({"v": 1, "kind": event.kind, **event.data}).encode())
            except (PublishRefused, ValueError) as error:  # refused by the broker, or what no message of ours may hold
                self._lose(str(error))

    def _lose(self, why: str) -> None:
        self.lost += 1
        if self.lost.bit_count() == 1:  # the 1st, 2nd, 4th, 8th …
            logger.warning("%d camera events are lost: %s", self.lost, why)
