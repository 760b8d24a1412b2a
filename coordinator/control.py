"""The coordinator at work: listens to the fleet, probes the primary, orders nodes about and keeps the balancer's file true."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import httpx
from typing_extensions import assert_never

from agent.gateway.probe import Probe, probe_primary
from agent.link.broker import Broker, LinkLost, PublishRefused, Received, Will
from agent.link.mqtt import Link
from agent.protocol import topics
from agent.protocol.messages import Command, CoordinatorPresence, Event, Heartbeat, Meta, Presence, Result, State
from agent.protocol.operations import OPS, arguments
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import MessageError, decode, encode, wire_now
from coordinator.config import CoordinatorSettings
from coordinator.decide import Activate, Hysteresis, Order, Policy, Renew, StandDown, decide
from coordinator.nginx import Balancer, NginxError
from coordinator.registry import Registry
from coordinator.roster import Roster

logger = logging.getLogger(__name__)

TICK_S = 1.0
RECONNECT_CAP_S = 30.0
RECEIVE_MAXIMUM = 200


class NotConnected(RuntimeError):
    """The broker is out of reach: the order is recorded and goes out with the node's next sync."""


class Control:
    """One acting coordinator. Everything runs on one event loop; the registry is its only durable state."""

    def __init__(self, settings: CoordinatorSettings, registry: Registry, client: httpx.AsyncClient) -> None:
        self._settings = settings
        self._registry = registry
        self._client = client
        self._roster = Roster(registry)
        self._balancer = Balancer(settings.nginx, settings.primary.url)
        leases = settings.leases
        self._policy = Policy(leases.lease_s, leases.renew_s, leases.contingent, leases.contingent_s, leases.min_active_s)
        self._link: Link | None = None
        self._balancer_problem = ""
        self.primary = Hysteresis(settings.primary.failures, settings.primary.passes)
        self.last_probe: Probe | None = None
        self.term = 0
        self._takers: dict[topics.Kind, tuple[type[Any], Callable[[Any, Received, float], Awaitable[None]]]] = {
            "presence": (Presence, self._take_presence),
            "meta": (Meta, self._take_meta),
            "state": (State, self._take_state),
            "hb": (Heartbeat, self._take_heartbeat),
            "res": (Result, self._take_result),
            "evt": (Event, self._take_event),
        }

    async def run(self) -> None:
        self.term = self._registry.next_term()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._keep_connected)
            tasks.start_soon(self._keep_probing)
            tasks.start_soon(self._keep_deciding)

    @property
    def is_connected(self) -> bool:
        return self._link is not None

    def views(self) -> list[Any]:
        return self._roster.views(anyio.current_time())

    async def send(self, node: str, op: str, args: dict[str, Any], deadline_s: float, raises_epoch: bool = True) -> Command:
        """Record an order, then send it. Raises MessageError for arguments that do not fit, NotConnected while the broker is away."""
        if op not in OPS:
            raise MessageError(f"unknown op {op!r}; known are {', '.join(OPS)}")
        command = Command(
            id=new_ulid(), op=op, node=node, issued_at=wire_now(), deadline_s=deadline_s, issuer=self._settings.name, args=args
        )
        arguments(command)
        command = self._registry.issue(command, time.time(), raises_epoch)  # noqa: TID251 — outlives this process
        if OPS[op].moves_lease:
            self._roster.ordered(command, anyio.current_time())
        await self._publish(command, deadline_s)
        return command

    def set_drained(self, node: str, is_drained: bool) -> None:
        self._registry.set_drained(node, is_drained)

    def forget(self, node: str) -> bool:
        self._roster.forget(node)
        return self._registry.forget(node)

    async def _publish(self, command: Command, expiry_s: float) -> None:
        if self._link is None:
            raise NotConnected(f"the broker is out of reach; {command.op} {command.id} goes out when {command.node} has synced")
        topic = topics.command(command.node, command.op)
        await self._link.publish(topic, encode(command), expiry_s=max(1, int(expiry_s)))

    # ── the fleet ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep_connected(self) -> None:
        attempt = 0
        while True:
            try:
                async with Link(self._broker(), self._will()) as link:
                    attempt = 0
                    await self._listen(link)
            except LinkLost as error:
                if attempt == 0:
                    logger.warning("broker lost: %s", error)
                self._link = None
                attempt += 1
                await anyio.sleep(random.uniform(0, min(RECONNECT_CAP_S, 2.0 ** min(attempt, 6))))

    async def _listen(self, link: Link) -> None:
        await link.subscribe(topics.COORDINATOR_SUBSCRIPTIONS)
        await link.publish(topics.coordinator_presence(), encode(self._presence(online=True)), retain=True)
        self._link = link
        logger.info("broker connected, term %d", self.term)
        try:
            async for message in link.messages():
                try:
                    await self._take(message)
                except (topics.TopicError, MessageError) as error:
                    logger.warning("message dropped: %s", error)
                link.acknowledge(message)
        finally:
            self._link = None

    async def _take(self, message: Received) -> None:
        topic = topics.parse(message.topic)
        known = self._takers.get(topic.kind)
        if known is None:
            return
        kind, take = known
        payload = decode(kind, message.payload)
        # The broker's ACL ties the topic to the sender; a payload must not speak of another node.
        if payload.node != topic.node:
            raise MessageError(f"payload of {payload.node!r} came in the topic of {topic.node!r}")
        await take(payload, message, anyio.current_time())

    async def _take_presence(self, presence: Presence, _message: Received, now_s: float) -> None:
        if presence.state != "offline":
            self._roster.heard(presence.node, now_s)
        elif not self._roster.is_death(presence):
            return
        self._registry.store("presence", presence)

    async def _take_meta(self, meta: Meta, _message: Received, _now_s: float) -> None:
        self._registry.store("meta", meta)

    async def _take_state(self, state: State, message: Received, now_s: float) -> None:
        if self._registry.store("state", state) or message.is_retained:
            self._roster.state_came(state, message.expiry_left_s, now_s)

    async def _take_heartbeat(self, heartbeat: Heartbeat, _message: Received, now_s: float) -> None:
        self._roster.heard(heartbeat.node, now_s)
        self._registry.store("heartbeat", heartbeat)

    async def _take_event(self, event: Event, _message: Received, now_s: float) -> None:
        self._roster.heard(event.node, now_s)
        if self._registry.add_event(event) and event.event_class == "sync":
            await self._reissue(event.node)

    async def _take_result(self, result: Result, _message: Received, now_s: float) -> None:
        if not self._registry.store_result(result):
            return
        row = self._registry.command(result.id)
        if row is None or not row.is_final:
            return
        logger.info(
            "%s %s on %s: %s%s", result.op, result.id, result.node, result.status, f" ({result.error.message})" if result.error else ""
        )
        if OPS[row.command.op].moves_lease:
            self._roster.ended(row.command, result, now_s)

    async def _reissue(self, node: str) -> None:
        """C1: after every connect of a node, whatever is not final goes out again under its old id."""
        now_s = time.time()  # noqa: TID251 — issued_s outlives this process
        for command, issued_s in self._registry.open_commands(node):
            left_s = command.deadline_s - max(0.0, now_s - issued_s)
            if left_s <= 0:
                self._registry.expire(command.id)
                continue
            await self._publish(command, left_s)

    # ── the primary ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep_probing(self) -> None:
        primary = self._settings.primary
        while True:
            started_s = anyio.current_time()
            key = await anyio.Path(primary.key_file).read_text() if primary.key_file else ""
            self.last_probe = probe = await probe_primary(self._client, primary.url, primary.model, key.strip(), primary.timeout_s)
            before, self.primary = self.primary, self.primary.after_probe(probe.is_good, anyio.current_time())
            if before.is_down != self.primary.is_down:
                logger.warning("primary %s is %s: %s", primary.url, "down" if self.primary.is_down else "up again", probe.reason)
            jittered_s = primary.interval_s * random.uniform(0.95, 1.05)
            await anyio.sleep(max(0.0, started_s + jittered_s - anyio.current_time()))

    # ── decisions ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep_deciding(self) -> None:
        while True:
            await anyio.sleep(TICK_S)
            now_s = anyio.current_time()
            if self._link is not None:
                for order in decide(self._policy, self.primary, self._roster.views(now_s), now_s):
                    try:
                        await self._order(order)
                    except (LinkLost, PublishRefused, NotConnected) as error:
                        logger.warning("order to %s not sent: %s", order.node, error)
            try:
                await self._balancer.apply(self._roster.backups(now_s))
                self._balancer_problem = ""
            except NginxError as error:
                if str(error) != self._balancer_problem:
                    logger.error("nginx not updated: %s", error)  # noqa: TRY400 — the message says it all
                self._balancer_problem = str(error)

    async def _order(self, order: Order) -> None:
        deadline_s = self._settings.leases.command_deadline_s
        match order:
            case Activate():
                await self.send(order.node, "activate", {"lease_s": order.lease_s, "kind": order.kind}, deadline_s)
            case Renew():
                await self.send(order.node, "renew", {"lease_s": order.lease_s}, deadline_s, raises_epoch=False)
            case StandDown():
                await self.send(order.node, "standby", {"reason": "the primary is healthy"}, deadline_s + 30)  # drains for up to 30 s
            case _:
                assert_never(order)

    def _presence(self, online: bool) -> CoordinatorPresence:
        return CoordinatorPresence(coordinator=self._settings.name, term=self.term, online=online, ts=wire_now())

    def _will(self) -> Will:
        return Will(topics.coordinator_presence(), encode(self._presence(online=False)))

    def _broker(self) -> Broker:
        given = self._settings.broker
        return Broker(
            given.host,
            given.port,
            client_id=f"coordinator-{self._settings.name}",
            username=given.username or None,
            password_file=given.password_file,
            ca_file=given.ca,
            certificate_file=given.certificate,
            key_file=given.key,
            receive_maximum=RECEIVE_MAXIMUM,
        )
