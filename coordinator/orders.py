"""Orders to nodes: recorded, sent, sent again until they are final, and closed when nobody answered."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterable
from typing import Any

import anyio
from pydantic import ValidationError
from typing_extensions import assert_never

from agent.link.broker import LinkLost, PublishRefused
from agent.link.mqtt import Link
from agent.protocol import topics
from agent.protocol.messages import Command, CoordinatorPresence
from agent.protocol.operations import OPS, arguments
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import MessageError, decode, encode, first_fault, wire_now
from coordinator.decide import Activate, Order, Renew, StandDown
from coordinator.problems import Problems
from coordinator.registry import Registry
from coordinator.roster import Roster

logger = logging.getLogger(__name__)

AT_ONCE = 50
ANSWER_GRACE_S = 5.0
DRAIN_S = 30.0


class NotActing(RuntimeError):
    """Another coordinator acts for this fleet; orders are given there."""


class Orders:
    """`link` and `rival` are set by who keeps the connection: nothing is sent without the one or in presence of the other."""

    def __init__(self, issuer: str, deadline_s: float, registry: Registry, roster: Roster, problems: Problems) -> None:
        self._issuer = issuer
        self._deadline_s = deadline_s
        self._registry = registry
        self._roster = roster
        self._problems = problems
        self.link: Link | None = None
        self.rival: CoordinatorPresence | None = None

    def resume(self) -> None:
        """Take up what an earlier process of this coordinator ordered and did not see answered."""
        for row in self._registry.open_commands():
            if OPS[row.command.op].moves_lease:
                self._roster.ordered(row, anyio.current_time(), wall_s())

    async def send(self, node: str, op: str, args: dict[str, Any], deadline_s: float) -> tuple[Command, bool]:
        """Record an order, then send it; whether it is sent already, or waits for the broker within its deadline.

        Raises KeyError for an unknown node, MessageError for what does not fit, PublishRefused where the broker will not have it,
        NotActing.
        """
        if op not in OPS:
            raise MessageError(f"unknown op {op!r}; known are {', '.join(OPS)}")
        if self.rival is not None:
            raise NotActing(f"coordinator {self.rival.coordinator} acts with term {self.rival.term}; give the order there")
        try:
            draft = Command(id=new_ulid(), op=op, node=node, issued_at=wire_now(), deadline_s=deadline_s, issuer=self._issuer, args=args)
        except ValidationError as error:
            raise MessageError(first_fault(Command, error)) from error
        command = decode(Command, encode(draft))  # what a node will read, or nothing
        arguments(command)
        row = self._registry.issue(command, wall_s())
        if OPS[op].moves_lease:
            self._roster.ordered(row, anyio.current_time(), wall_s())
        try:
            return row.command, await self._publish(row.command, deadline_s)
        except PublishRefused:
            self._registry.expire(command.id)
            raise

    async def reissue(self, node: str | None = None) -> None:
        """C1: after every connect, of a node or our own, whatever is not final goes out again under its old id."""
        if self.rival is not None:
            return
        for row in self._registry.open_commands(node):
            left_s = row.command.deadline_s - max(0.0, wall_s() - row.issued_s)
            if left_s > 0:
                try:
                    await self._publish(row.command, left_s)
                except PublishRefused as error:
                    self._registry.expire(row.command.id)
                    logger.warning("%s %s for %s is given up: %s", row.command.op, row.command.id, row.command.node, error)

    def close_unanswered(self) -> None:
        for row in self._registry.open_commands():
            if wall_s() > row.issued_s + row.command.deadline_s + ANSWER_GRACE_S:
                self._registry.expire(row.command.id)
                logger.warning("%s %s for %s was not answered", row.command.op, row.command.id, row.command.node)

    async def carry_out(self, orders: Iterable[Order]) -> None:
        """Many at once: a renewal must not wait for the acknowledgements of all before it. Raises sqlite3.Error."""
        broken: list[sqlite3.Error] = []
        limit = anyio.CapacityLimiter(AT_ONCE)

        async def one(order: Order) -> None:
            async with limit:
                try:
                    await self._give(order)
                    self._problems.note(order.node, "")
                except sqlite3.Error as error:
                    broken.append(error)
                except Exception as error:  # noqa: BLE001 — one node's trouble must not keep the others from their renewals
                    self._problems.note(order.node, f"order not sent: {type(error).__name__}: {error}")

        async with anyio.create_task_group() as tasks:
            for order in orders:
                tasks.start_soon(one, order)
        if broken:
            raise broken[0]

    async def _give(self, order: Order) -> None:
        match order:
            case Activate():
                await self.send(order.node, "activate", {"lease_s": order.lease_s, "kind": order.kind}, self._deadline_s)
            case Renew():
                await self.send(order.node, "renew", {"lease_s": order.lease_s}, self._deadline_s)
            case StandDown():
                await self.send(order.node, "standby", {"reason": "the primary is healthy"}, self._deadline_s + DRAIN_S)
            case _:
                assert_never(order)

    async def _publish(self, command: Command, left_s: float) -> bool:
        if self.link is None:
            return False
        try:
            await self.link.publish(topics.command(command.node, command.op), encode(command), expiry_s=max(1, int(left_s)))
        except LinkLost:
            return False  # it goes out again after the next connect
        return True


def wall_s() -> float:
    return time.time()  # noqa: TID251 — when an order was given outlives this process
