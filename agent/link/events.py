"""Events on their way to the coordinator: named, stamped and stored in the outbox, with or without a broker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import anyio
from anyio import to_thread
from pydantic import JsonValue

from agent.link.outbox import Outbox, OutboxClass
from agent.link.store import StoreError
from agent.protocol import topics
from agent.protocol.messages import Event
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import Severity, encode, wire_now

logger = logging.getLogger(__name__)

FAULT_INTERVAL_S = 10.0


class Events:
    """Never raises for a full disk or a missing broker: what cannot be kept is dropped and counted by the outbox."""

    def __init__(self, *, node: str, outbox: Outbox, clock: Callable[[], float]) -> None:
        self._node = node
        self._outbox = outbox
        self._clock = clock
        self._arrived = anyio.Event()
        self._next_fault_s = 0.0
        self._silent_faults = 0

    @property
    def arrived(self) -> anyio.Event:
        """Set when something is stored after this property was read."""
        return self._arrived

    async def publish(self, event_class: str, severity: Severity, data: Mapping[str, JsonValue]) -> None:
        event = Event(
            id=new_ulid(),
            node=self._node,
            event_class=event_class,
            severity=severity,
            ts=wire_now(),
            mono=self._clock(),
            data=dict(data),
        )
        await self.store("event" if severity == "info" else "alarm", topics.event(self._node, event_class), encode(event))

    async def fault(self, reason: str, topic: str) -> None:
        """A message that is not of the protocol was dropped. One event in ten seconds: a flood must not wear out the disk."""
        if self._clock() < self._next_fault_s:
            self._silent_faults += 1
            return
        self._next_fault_s = self._clock() + FAULT_INTERVAL_S
        logger.warning("message on %s dropped: %s", topic[:200], reason)
        await self.publish("protocol", "warning", {"reason": reason[:500], "topic": topic[:200], "silent_before": self._silent_faults})
        self._silent_faults = 0

    async def store(self, outbox_class: OutboxClass, topic: str, payload: bytes) -> None:
        try:
            await to_thread.run_sync(self._outbox.put, outbox_class, topic, payload, self._clock())
        except StoreError as error:
            self._outbox.dropped(outbox_class)
            logger.warning("a message for %s is lost: the outbox does not take it: %s", topic, error)
        self._arrived.set()
        self._arrived = anyio.Event()
