"""The coordinator at work: keeps the connection, listens to the fleet, decides, and keeps the balancer's file true."""

from __future__ import annotations

import logging
import random
import sqlite3
from collections.abc import Awaitable, Callable

import anyio
import httpx

from agent.link.broker import Broker, LinkLost, PublishRefused, Received, Will
from agent.link.mqtt import Link
from agent.protocol import topics
from agent.protocol.messages import CoordinatorPresence, Resync
from agent.protocol.wire import MessageError, decode, encode, wire_now
from coordinator.config import CoordinatorSettings
from coordinator.decide import NodeView, Policy, decide
from coordinator.desired import DesiredDocuments
from coordinator.intake import Intake
from coordinator.nginx import Balancer, NginxError
from coordinator.orders import Orders
from coordinator.primary import PrimaryWatch
from coordinator.problems import Problems
from coordinator.registry import Registry
from coordinator.roster import Roster
from coordinator.term import judge

logger = logging.getLogger(__name__)

TICK_S = 0.5
RECONNECT_CAP_S = 30.0
YOUNG_S = 5.0  # a connection that ends sooner does not count as success: an ACL or a second coordinator throws us out
KEEPALIVE_S = 10  # a dead broker is noticed before the nodes behind it would count as silent
RECEIVE_MAXIMUM = 200
INTRODUCTIONS_PER_S = 200


class Control:
    """One acting coordinator. Everything runs on one event loop; the registry is its only durable state.

    A coordinator that cannot keep its record hangs up, and its will tells the nodes: better none than one that looks alive and
    neither renews nor listens. While it is connected to no broker it changes nothing, the balancer's file included.
    """

    def __init__(self, settings: CoordinatorSettings, registry: Registry, client: httpx.AsyncClient, tick_s: float = TICK_S) -> None:
        self._settings = settings
        self._tick_s = tick_s
        self._registry = registry
        self._roster = Roster(registry)
        self._intake = Intake(registry, self._roster)
        self._balancer = Balancer(settings.nginx, settings.primary.url)
        leases = settings.leases
        self._policy = Policy(leases.lease_s, leases.renew_s, leases.contingent, leases.contingent_s, leases.min_active_s)
        self._has_resynced = False
        self.problems = Problems()
        self.orders = Orders(settings.name, leases.command_deadline_s, registry, self._roster, self.problems)
        self.desired = DesiredDocuments(registry, self.orders)
        self.primary = PrimaryWatch(settings.primary, client, self._serving)
        self.term = 0

    async def run(self) -> None:
        """Never ends by itself. Raises sqlite3.Error if the record takes no new term."""
        self.term = self._registry.next_term()
        self.orders.resume()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.primary.run)
            tasks.start_soon(self._keep_connected)

    @property
    def name(self) -> str:
        return self._settings.name

    @property
    def is_connected(self) -> bool:
        return self.orders.link is not None

    def views(self) -> dict[str, NodeView]:
        return {view.node: view for view in self._roster.views(anyio.current_time())}

    def presence_of(self, node: str) -> str:
        """`online`, or why it is not."""
        row = self._registry.node(node)
        return self._roster.why(row, anyio.current_time()) if row else "unknown"

    def silence_of(self, node: str) -> float | None:
        """Seconds since this process heard of it; None where it never did."""
        return self._roster.silence_s(node, anyio.current_time())

    def _serving(self) -> list[str]:
        return [view.node for view in self._roster.views(anyio.current_time()) if view.is_online and view.mode in ("active", "autonomous")]

    async def forget(self, node: str) -> bool:
        """Drop a node from the record and what the broker keeps of it. Whether it was known; it comes back if it speaks again."""
        is_known = self._registry.forget(node)
        self._roster.forget(node)
        if (link := self.orders.link) is not None and is_known:
            for topic in (topics.presence(node), topics.meta(node), topics.state(node), topics.desired(node)):
                await link.publish(topic, b"", retain=True)
        return is_known

    async def _keep_connected(self) -> None:
        attempt = 0
        while True:
            began_s = float("inf")
            try:
                self._registry.check()
                async with Link(self._broker(), self._will()) as link:
                    began_s = anyio.current_time()
                    await self._live(link)
            except (LinkLost, PublishRefused, sqlite3.Error) as error:
                self.problems.note("broker" if isinstance(error, LinkLost) else "connection", f"{type(error).__name__}: {error}")
            attempt = 0 if anyio.current_time() - began_s >= YOUNG_S else attempt + 1
            await anyio.sleep(random.uniform(0, min(RECONNECT_CAP_S, 2.0 ** min(attempt, 6))))

    async def _live(self, link: Link) -> None:
        ends: list[Exception] = []
        try:
            async with anyio.create_task_group() as tasks:

                async def until_lost(part: Callable[[], Awaitable[None]]) -> None:
                    try:
                        await part()
                    except (LinkLost, PublishRefused, sqlite3.Error) as error:
                        ends.append(error)
                        tasks.cancel_scope.cancel()

                async def listen() -> None:
                    await self._introduce(link)
                    self.orders.link = link
                    self.problems.note("broker", "")
                    logger.info("broker connected, term %d", self.term)
                    for part in (self.orders.reissue, self.desired.reissue, self._keep_deciding, self._keep_balancing):
                        tasks.start_soon(until_lost, part)
                    await self._listen(link)

                tasks.start_soon(until_lost, listen)
        finally:
            self.orders.link = None
        raise ends[0]

    async def _introduce(self, link: Link) -> None:
        self._roster.listens(anyio.current_time())
        self._balancer.hold()
        await link.subscribe(topics.COORDINATOR_SUBSCRIPTIONS)
        await self._say_presence(link)
        if self._has_resynced and link.session_present:
            return  # the broker has kept all but heartbeats for us
        spread_s = min(3600.0, len(self._registry.nodes()) / INTRODUCTIONS_PER_S)
        await link.publish(
            topics.coordinator_resync(), encode(Resync(spread_s=spread_s)), expiry_s=topics.POLICIES["coord-resync"].expiry_s
        )
        self._has_resynced = True

    async def _listen(self, link: Link) -> None:
        async for message in link.messages():
            try:
                await self._take(link, message)
            except (LinkLost, sqlite3.Error):
                raise  # not acknowledged: the broker brings it again
            except Exception as error:  # noqa: BLE001 — one message must never end the listener, nor come back to try again
                self.problems.dropped(f"{message.topic[:200]}: {type(error).__name__}: {error}")
            link.acknowledge(message)

    async def _take(self, link: Link, message: Received) -> None:
        topic = topics.parse(message.topic)
        if topic.kind == "coord-presence":
            await self._judge(link, message.payload)
        elif self._intake.take(topic, message, anyio.current_time()):
            await self.orders.reissue(topic.node)
            await self.desired.reissue(topic.node)

    async def _judge(self, link: Link, payload: bytes) -> None:
        try:
            seen = decode(CoordinatorPresence, payload) if payload else None
        except MessageError:
            seen = None
        verdict = judge(self._settings.name, self.term, seen)
        self.orders.rival = seen if verdict == "yield" else None
        self.problems.note("rival", f"coordinator {seen.coordinator} acts with term {seen.term}" if seen and verdict == "yield" else "")
        if verdict == "rise" and seen is not None:
            self.term = self._registry.next_term(seen.term)
            logger.warning("the fleet has seen term %d of %s; this coordinator goes on with %d", seen.term, seen.coordinator, self.term)
        if verdict in ("rise", "repair"):
            await self._say_presence(link)

    async def _keep_deciding(self) -> None:
        while True:
            await anyio.sleep(self._tick_s)
            try:
                now_s = anyio.current_time()
                self._roster.watch(now_s)
                self.orders.close_unanswered()
                if self.orders.rival is None:
                    await self.orders.carry_out(decide(self._policy, self.primary.health, self._roster.views(now_s), now_s))
                self.problems.note("decisions", "")
            except (LinkLost, sqlite3.Error):
                raise
            except Exception as error:  # noqa: BLE001 — whatever it is, the next tick may do better, and the operator is told
                self.problems.note("decisions", f"{type(error).__name__}: {error}")

    async def _keep_balancing(self) -> None:
        while True:
            await anyio.sleep(self._tick_s)
            if self.orders.rival is not None:
                continue
            try:
                await self._balancer.apply(self._roster.backups(anyio.current_time()))
                self.problems.note("nginx", "")
            except (NginxError, OSError) as error:
                self.problems.note("nginx", f"not updated: {error}")

    async def _say_presence(self, link: Link) -> None:
        await link.publish(topics.coordinator_presence(), encode(self._presence(online=True)), retain=True)

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
            keepalive_s=KEEPALIVE_S,
            receive_maximum=RECEIVE_MAXIMUM,
        )
