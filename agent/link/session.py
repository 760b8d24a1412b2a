"""The node's life with its broker: connect, say who it is, serve, reconnect; the same sequence after every CONNACK."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import anyio
from anyio import to_thread

from agent.link import reports
from agent.link.backoff import Backoff, BackoffPolicy, after_failure, after_session, delay_s, is_contested
from agent.link.broker import Broker, LinkLost, PublishRefused, Received, Will
from agent.link.commands import Commands
from agent.link.events import Events
from agent.link.journal import Journal
from agent.link.mqtt import Link
from agent.link.outbox import Outbox
from agent.link.reports import Identity, Reports, Standing
from agent.link.store import StoreError
from agent.protocol import topics
from agent.protocol.messages import CoordinatorPresence, Desired, Result, Resync
from agent.protocol.topics import POLICIES, Kind, TopicError
from agent.protocol.wire import Clock, Message, MessageError, decode, encode

logger = logging.getLogger(__name__)

STATE_INTERVAL_S = 1.0
REFRESH_S = 12 * 3600.0  # before the retained state expires after a day
SEQ_BLOCK = 1000


@dataclass(frozen=True, slots=True)
class SessionSettings:
    heartbeat_active_s: float = 10.0
    heartbeat_standby_s: float = 30.0
    outbox_per_s: float = 50.0
    will_delay_s: int = 10
    goodbye_s: float = 2.0
    backoff: BackoffPolicy = field(default_factory=BackoffPolicy)


@dataclass(frozen=True, slots=True)
class Uplink:
    """What the node knows of the other side. A coordinator counts as online only while the broker is up."""

    broker_is_up: bool = False
    coordinator_is_online: bool = False
    term: int = 0


class Session:
    """`run()` never ends by itself; cancelled, it publishes a clean stop within `goodbye_s`.

    `on_uplink` and `on_desired` are called on the event loop and must return at once. The desired document is handed on
    as it comes, the same one again after each reconnect. `stop_reason` is what a clean stop says. `ticked_s`: its last sign of life.
    """

    def __init__(
        self,
        *,
        broker: Broker,
        journal: Journal,
        outbox: Outbox,
        events: Events,
        commands: Commands,
        reports: Reports,
        clock: Callable[[], float],
        clock_is_synced: Callable[[], bool],
        on_uplink: Callable[[Uplink], None],
        on_desired: Callable[[Desired], None],
        settings: SessionSettings = SessionSettings(),
        on_switch: Callable[[str, bool], None] | None = None,
    ) -> None:
        self._broker = broker
        self._node = broker.client_id
        self._journal = journal
        self._outbox = outbox
        self._events = events
        self._commands = commands
        self._reports = reports
        self._clock = clock
        self._clock_is_synced = clock_is_synced
        self._on_uplink = on_uplink
        self._on_desired = on_desired
        self._settings = settings
        self._on_switch = on_switch
        self._link: Link | None = None
        self._who = Identity(self._node, journal.boot, 0)
        self._uplink = Uplink()
        self._changed = anyio.Event()
        self._seq, self._seq_end = 0, 0
        self._said: tuple[str, int] | None = None
        self._resync_asked = anyio.Event()
        self._spread_s = 0.0
        self.ticked_s = anyio.current_time()
        self.stop_reason: Literal["shutdown", "update", "reboot"] = "shutdown"

    def meta_changed(self) -> None:
        """The node introduces itself again."""
        self._resync_asked.set()

    def state_changed(self) -> None:
        """Presence and state are published anew, at most once a second."""
        self._changed.set()

    async def publish_data(self, pipeline: str, payload: bytes) -> None:
        """Detections and the like, now or never."""
        topic = topics.data(self._node, pipeline)
        try:
            if self._link is None:
                raise LinkLost("not connected")
            await self._link.publish(topic, payload, qos=0, expiry_s=POLICIES["data"].expiry_s)
        except LinkLost:
            self._outbox.dropped("data")

    @property
    def connection(self) -> int | None:
        """The number of the session that lives now; None while there is none."""
        return self._who.sess if self._link is not None else None

    async def publish_retained(self, topic: str, payload: bytes, qos: Literal[0, 1], expiry_s: int | None = None) -> None:
        """What is so now, for those who come later; an empty payload clears it. Raises LinkLost and PublishRefused: nothing is stored."""
        if self._link is None:
            raise LinkLost("not connected")
        await self._link.publish(topic, payload, qos=qos, retain=True, expiry_s=expiry_s)

    async def run(self) -> None:
        backoff, policy = Backoff(), self._settings.backoff
        while True:
            self.ticked_s = anyio.current_time()
            began_s: float | None = None
            try:
                sess = await to_thread.run_sync(self._journal.next_session)
                self._who = Identity(self._node, self._journal.boot, sess)
                will = encode(reports.will(self._who, self._reports.standing()))
                async with Link(self._broker, Will(topics.presence(self._node), will, self._settings.will_delay_s)) as link:
                    began_s = anyio.current_time()
                    await self._live(link)
            except (LinkLost, StoreError) as error:
                self._end(str(error), is_first_failure=began_s is not None or backoff.failures == 0)
            if began_s is None:
                backoff = after_failure(backoff)
            else:
                was_contested = is_contested(backoff, policy)
                backoff = after_session(backoff, anyio.current_time() - began_s, policy)
                if is_contested(backoff, policy) and not was_contested:
                    await self._events.publish("session", "warning", {"reason": "sessions die young", "count": backoff.young_sessions})
            await anyio.sleep(delay_s(backoff, policy, random.random()))

    async def _live(self, link: Link) -> None:
        try:
            await link.subscribe(topics.node_subscriptions(self._node))
            if self._on_switch is not None:
                await self._hear_switches(link)
            await self._introduce(link, is_known=link.session_present)
            self._link = link
            logger.info("connected to %s:%s as session %s", self._broker.host, self._broker.port, self._who.sess)
            self._tell(replace(self._uplink, broker_is_up=True))
            await self._serve(link)
        except anyio.get_cancelled_exc_class():
            with anyio.move_on_after(self._settings.goodbye_s, shield=True):
                await self._goodbye(link)
            raise
        finally:
            self._link = None

    async def _hear_switches(self, link: Link) -> None:
        try:
            await link.subscribe([topics.switch_subscription(self._node)])
        except LinkLost as error:  # a broker whose ACL is of before there were switches must not keep the node away
            logger.warning("cameras cannot be switched over MQTT: %s", error)

    async def _serve(self, link: Link) -> None:
        lost: list[LinkLost | StoreError] = []
        async with anyio.create_task_group() as tasks:

            async def until_lost(part: Callable[[], Awaitable[None]]) -> None:
                try:
                    await part()
                except (LinkLost, StoreError) as error:
                    lost.append(error)
                    tasks.cancel_scope.cancel()

            for part in (self._read, self._send_heartbeats, self._send_states, self._send_results, self._send_outbox, self._resync):
                tasks.start_soon(until_lost, partial(part, link))
        raise lost[0]

    async def _introduce(self, link: Link, is_known: bool) -> None:
        standing = self._reports.standing()
        await self._say_presence(link, standing)
        meta = reports.meta(self._who, self._reports.meta())
        if not is_known or meta.hash != await to_thread.run_sync(self._journal.meta_hash):
            await self._say(link, "meta", meta)
            await to_thread.run_sync(self._journal.save_meta_hash, meta.hash or "")
        body = self._reports.state()
        await self._say(link, "state", reports.state(self._who, standing, body, await self._next_seq(), self._clock_state()))
        last_ids, open_ids = await to_thread.run_sync(lambda: (self._journal.recent_ids(), self._journal.open_ids()))
        event = reports.sync(self._who, self._clock(), standing.epoch, body.desired_rev, last_ids, open_ids)
        await self._say(link, "evt", event, "sync")

    async def _read(self, link: Link) -> None:
        async for message in link.messages():
            try:
                topic = topics.parse(message.topic)
                if message.is_retained and topic.kind in ("cmd", "coord-resync", "camera-switch"):
                    raise MessageError(f"a retained {topic.kind} is never obeyed; clear it")
                if topic.kind == "cmd" and topic.leaf is not None:
                    await self._commands.receive(message, topic.leaf, partial(link.acknowledge, message))
                    continue
                if topic.kind == "camera-switch" and topic.leaf is not None:
                    self._switch(topic.leaf, message.payload)
                self._hear(topic.kind, message)
            except (TopicError, MessageError) as error:
                await self._events.fault(str(error), message.topic)
            link.acknowledge(message)

    def _switch(self, camera: str, payload: bytes) -> None:
        if payload not in (b"ON", b"OFF"):
            raise MessageError(f"a camera is switched ON or OFF, not {payload[:20]!r}")
        if self._on_switch is not None:
            self._on_switch(camera, payload == b"ON")

    def _hear(self, kind: str, message: Received) -> None:
        match kind:
            case "desired" if message.payload:
                self._on_desired(decode(Desired, message.payload))
            case "coord-presence" if message.payload:
                presence = decode(CoordinatorPresence, message.payload)
                # Not the late will of a coordinator that another has replaced.
                if presence.online or presence.term >= self._uplink.term:
                    self._tell(replace(self._uplink, coordinator_is_online=presence.online, term=presence.term))
            case "coord-resync":
                self._spread_s = decode(Resync, message.payload).spread_s
                self._resync_asked.set()

    async def _resync(self, link: Link) -> None:
        while True:
            await self._resync_asked.wait()
            await anyio.sleep(random.uniform(0, self._spread_s))
            self._resync_asked = anyio.Event()
            await self._introduce(link, is_known=False)

    async def _send_heartbeats(self, link: Link) -> None:
        while True:
            self.ticked_s = anyio.current_time()
            standing = self._reports.standing()
            is_busy = standing.mode in ("active", "autonomous", "draining")
            interval_s = self._settings.heartbeat_active_s if is_busy else self._settings.heartbeat_standby_s
            level = await to_thread.run_sync(self._outbox.level, self._clock())
            seq = await self._next_seq()
            body = self._reports.heartbeat()
            message = reports.heartbeat(self._who, standing, body, seq, self._clock(), self._clock_state(), interval_s, level)
            await link.publish(topics.heartbeat(self._node), encode(message), qos=0, expiry_s=round(3 * interval_s))
            await anyio.sleep(interval_s * random.uniform(0.9, 1.1))

    async def _send_states(self, link: Link) -> None:
        while True:
            with anyio.move_on_after(REFRESH_S) as waiting:
                await self._changed.wait()
            self._changed = anyio.Event()
            standing = self._reports.standing()
            if waiting.cancelled_caught or self._said != (standing.mode, standing.epoch):
                await self._say_presence(link, standing)
            if waiting.cancelled_caught:
                await self._say(link, "meta", reports.meta(self._who, self._reports.meta()))
            body = self._reports.state()
            await self._say(link, "state", reports.state(self._who, standing, body, await self._next_seq(), self._clock_state()))
            await anyio.sleep(STATE_INTERVAL_S)

    async def _send_results(self, link: Link) -> None:
        overflowed = -1
        while True:
            if self._commands.overflowed != overflowed:
                overflowed = self._commands.overflowed
                while unsent := await to_thread.run_sync(self._journal.unsent):
                    for result in unsent:
                        await self._send_result(link, result)
            await self._send_result(link, await self._commands.outgoing.get())

    async def _send_result(self, link: Link, result: Result) -> None:
        try:
            await link.publish(topics.result(self._node, result.id), encode(result), expiry_s=POLICIES["res"].expiry_s)
        except (PublishRefused, MessageError) as error:
            logger.error("result of command %s is lost: %s", result.id, error)  # noqa: TRY400 - the trace adds nothing
        await to_thread.run_sync(self._journal.sent, result)

    async def _send_outbox(self, link: Link) -> None:
        while True:
            arrived = self._events.arrived
            waiting = await to_thread.run_sync(self._outbox.oldest, self._clock())
            if not waiting:
                await arrived.wait()
            for message in waiting:
                try:
                    await link.publish(message.topic, message.payload, expiry_s=message.expiry_s)
                except PublishRefused as error:
                    self._outbox.dropped(message.outbox_class)
                    logger.warning("an event is lost: %s", error)
                await to_thread.run_sync(self._outbox.done, message)
                await anyio.sleep(1 / self._settings.outbox_per_s)

    async def _goodbye(self, link: Link) -> None:
        try:
            await self._say(link, "presence", reports.goodbye(self._who, self._reports.standing(), self.stop_reason))
        except (LinkLost, PublishRefused) as error:
            logger.warning("no clean goodbye: %s", error)
        link.disconnect()

    async def _say_presence(self, link: Link, standing: Standing) -> None:
        await self._say(link, "presence", reports.birth(self._who, standing))
        self._said = (standing.mode, standing.epoch)

    async def _say(self, link: Link, kind: Kind, message: Message, leaf: str | None = None) -> None:
        policy = POLICIES[kind]
        try:
            topic = topics.build(topics.Topic(kind, self._node, leaf))
            await link.publish(topic, encode(message), qos=policy.qos, retain=policy.retain, expiry_s=policy.expiry_s)
        except PublishRefused as error:
            raise LinkLost(f"{error}; check the broker's ACL for client {self._node}") from error
        except MessageError as error:
            logger.error("%s cannot be reported: %s", kind, error)  # noqa: TRY400 - the trace adds nothing

    async def _next_seq(self) -> int:
        if self._seq == self._seq_end:
            self._seq = await to_thread.run_sync(self._journal.reserve, SEQ_BLOCK)
            self._seq_end = self._seq + SEQ_BLOCK
        self._seq += 1
        return self._seq - 1

    def _clock_state(self) -> Clock:
        return "synced" if self._clock_is_synced() else "unsynced"

    def _tell(self, uplink: Uplink) -> None:
        if uplink != self._uplink:
            self._uplink = uplink
            self._on_uplink(uplink)

    def _end(self, why: str, is_first_failure: bool) -> None:
        if is_first_failure:
            logger.warning("no link to the broker: %s", why)
        self._tell(replace(self._uplink, broker_is_up=False, coordinator_is_online=False))
