"""What nodes say, message by message, into the record and the roster. Untrusted bytes end here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from agent.link.broker import Received
from agent.protocol import topics
from agent.protocol.messages import Event, Heartbeat, Meta, Presence, Result, State
from agent.protocol.operations import OPS
from agent.protocol.topics import Kind, Topic
from agent.protocol.wire import MessageError, decode
from coordinator.registry import Registry
from coordinator.roster import Roster

logger = logging.getLogger(__name__)


class Intake:
    """`take` is called for each publication, in the broker's order."""

    def __init__(self, registry: Registry, roster: Roster) -> None:
        self._registry = registry
        self._roster = roster
        self._takers: dict[Kind, tuple[type[Any], Callable[[Any, Received, float], bool]]] = {
            "presence": (Presence, self._presence),
            "meta": (Meta, self._meta),
            "state": (State, self._state),
            "hb": (Heartbeat, self._heartbeat),
            "res": (Result, self._result),
            "evt": (Event, self._event),
        }

    def take(self, topic: Topic, message: Received, now_s: float) -> bool:
        """Record it. True where the node asks for what is open (`sync`). Raises MessageError for what is not of the protocol."""
        known = self._takers.get(topic.kind)
        if known is None or (not message.payload and topics.POLICIES[topic.kind].retain):  # somebody cleared a retained topic
            return False
        kind, take = known
        payload = decode(kind, message.payload)
        # The broker's ACL ties the topic to the sender; a payload must not speak of another node.
        if payload.node != topic.node:
            raise MessageError(f"payload of {payload.node!r} came in the topic of {topic.node!r}")
        if topic.leaf is not None and topic.leaf != (payload.event_class if isinstance(payload, Event) else payload.id):
            raise MessageError(f"payload of another {topic.kind} came in {message.topic}")
        return take(payload, message, now_s)

    def _presence(self, presence: Presence, message: Received, now_s: float) -> bool:
        if presence.state == "offline" and not self._roster.is_death(presence):
            return False
        self._registry.store("presence", presence)
        if presence.state != "offline":
            self._hear(presence.node, message, now_s)
        return False

    def _meta(self, meta: Meta, _message: Received, _now_s: float) -> bool:
        before = self._registry.node(meta.node)
        self._registry.store("meta", meta)
        if before is None or before.meta is None:
            logger.info("node %s is registered: agent %s on %s", meta.node, meta.agent, meta.hw.module)
        return False

    def _state(self, state: State, message: Received, now_s: float) -> bool:
        is_news = self._registry.store("state", state)
        self._hear(state.node, message, now_s)
        row = self._registry.node(state.node)
        # A retained state may be known from before a restart: what it says of the lease is news to this process.
        if is_news or (message.is_retained and row is not None and row.state == state):
            self._roster.state_came(state, message.expiry_left_s, now_s)
        return False

    def _heartbeat(self, heartbeat: Heartbeat, message: Received, now_s: float) -> bool:
        self._registry.store("heartbeat", heartbeat)
        self._hear(heartbeat.node, message, now_s)
        return False

    def _event(self, event: Event, message: Received, now_s: float) -> bool:
        self._hear(event.node, message, now_s)
        return self._registry.add_event(event) and event.event_class == "sync"

    def _result(self, result: Result, message: Received, now_s: float) -> bool:
        self._hear(result.node, message, now_s)
        self._registry.raise_epoch(result.node, result.epoch)  # L3: also for orders that a restored record has never heard of
        if not self._registry.store_result(result):
            return False
        row = self._registry.command(result.id)
        if row is None or not row.is_final:
            return False
        why = f" ({result.error.code}: {result.error.message})" if result.error else ""
        logger.info("%s %s on %s: %s%s", result.op, result.id, result.node, result.status, why)
        operation = OPS.get(row.command.op)
        if operation is not None and operation.moves_lease:
            self._roster.ended(row, result, now_s)
        return False

    def _hear(self, node: str, message: Received, now_s: float) -> None:
        if not message.is_retained:
            self._roster.heard(node, now_s)
