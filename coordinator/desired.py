"""What the operator wants to stay true on each node: recorded, published retained, and again where a node does not have it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pydantic import ValidationError

from agent.link.broker import LinkLost, PublishRefused
from agent.protocol import topics
from agent.protocol.messages import Desired, DesiredModel, DesiredPipeline
from agent.protocol.wire import MessageError, decode, encode, first_fault
from coordinator.orders import NotActing, Orders
from coordinator.registry import NodeRow, Registry

logger = logging.getLogger(__name__)


class DesiredDocuments:
    """`orders` knows whether there is a broker and whether another coordinator acts: then nothing is published from here."""

    def __init__(self, registry: Registry, orders: Orders) -> None:
        self._registry = registry
        self._orders = orders

    async def want(self, node: str, models: Sequence[DesiredModel], pipelines: Sequence[DesiredPipeline]) -> tuple[Desired, bool]:
        """Record a whole document under a revision that the node has not seen; whether it is sent already, or waits for the broker.

        Raises KeyError for an unknown node, MessageError for what does not fit, PublishRefused, NotActing.
        """
        if (rival := self._orders.rival) is not None:
            raise NotActing(f"coordinator {rival.coordinator} acts with term {rival.term}; say there what is wanted")
        row, before = self._registry.node(node), self._registry.desired(node)
        if row is None:
            raise KeyError(node)
        # Above the node's too: after this record was restored from a backup it may be the higher one.
        revision = max(before.rev if before else 0, _taken(row)) + 1
        try:
            document = Desired(rev=revision, models=tuple(models), pipelines=tuple(pipelines))
        except ValidationError as error:
            raise MessageError(first_fault(Desired, error)) from error
        document = decode(Desired, encode(document))  # what the node will read, or nothing
        self._registry.want(node, document)
        logger.info("desired state of revision %d for %s", revision, node)
        try:
            return document, await self._publish(node, document)
        except PublishRefused:
            self._registry.want(node, before)  # the operator is told that it failed, so it must not reach the node later
            raise

    async def reissue(self, node: str | None = None) -> None:
        """After every connect, of a node or our own: a broker that lost its retained messages, a node that was flashed anew."""
        if self._orders.rival is not None:
            return
        for name in [node] if node is not None else self._registry.wanting():
            row, document = self._registry.node(name), self._registry.desired(name)
            if row is not None and document is not None and _taken(row) < document.rev:
                try:
                    await self._publish(name, document)
                except PublishRefused as error:
                    logger.warning("desired state of %s is not sent: %s", name, error)

    async def _publish(self, node: str, document: Desired) -> bool:
        if (link := self._orders.link) is None:
            return False
        try:
            await link.publish(topics.desired(node), encode(document), retain=True)
        except LinkLost:
            return False  # it goes out again after the next connect
        return True


def _taken(row: NodeRow) -> int:
    return row.state.desired_rev if row.state else 0
