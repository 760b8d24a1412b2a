"""From the cameras to the broker, below a root of their own: what is seen now or never, what is so as retained state, and for Home
Assistant who they are. What happens to a camera goes to the coordinator as an event that must not be lost."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import anyio
from anyio import to_thread

from agent.cameras.home_assistant import Device, discovery
from agent.cameras.images import Images
from agent.cameras.reports import camera_state, has_news
from agent.link.broker import LinkLost, PublishRefused
from agent.link.events import Events
from agent.protocol import topics
from agent.protocol.topics import POLICIES
from agent.protocol.wire import MessageError, Severity, encode
from agent.worker_protocol import CameraEvent
from models.durable import write_atomically

logger = logging.getLogger(__name__)

WAITING = 256
STATE_EVERY_S = 1.0
FIGURES_EVERY_S = 30.0
ANNOUNCE_EVERY = 5  # looks at the states


class Uplink(Protocol):
    """What is needed of the session; see agent/link/session.py."""

    @property
    def connection(self) -> int | None: ...

    async def publish_data(self, pipeline: str, payload: bytes) -> None: ...

    async def publish_retained(self, topic: str, payload: bytes, qos: Literal[0, 1], expiry_s: int | None = None) -> None: ...


class Broadcast:
    """`offer` never waits: what the broker is too slow for is dropped and counted.

    `cameras` gives a report of each camera that is wanted, with its `id`; `devices` are those that Home Assistant is told of. What it was
    told is remembered in `memory`, so that what is no longer so can be cleared.
    """

    def __init__(
        self,
        node: str,
        events: Events,
        uplink: Uplink,
        cameras: Callable[[], list[dict[str, Any]]],
        devices: Callable[[], list[Device]],
        prefix: str,
        images: Images,
        memory: Path,
        state_s: float = STATE_EVERY_S,
    ) -> None:
        self._node = node
        self._events = events
        self._uplink = uplink
        self._cameras = cameras
        self._devices = devices
        self._prefix = prefix
        self._images = images
        self._memory = memory
        self._state_s = state_s
        self._in, self._out = anyio.create_memory_object_stream[CameraEvent](WAITING)
        self._stated: dict[str, tuple[Mapping[str, Any], float]] = {}
        self._told: dict[str, bytes] = {}
        self._remembered: set[str] = set()
        self._connection: int | None = None
        self._has_been_refused = False
        self.lost = 0

    def note(self, severity: Severity, text: str) -> None:
        """Something that no camera in particular does, such as a disk that takes no events."""
        self.offer(CameraEvent("", "note", {"severity": severity, "message": text}))

    def offer(self, event: CameraEvent, payload: bytes = b"") -> None:
        if event.kind == "object" and payload:
            self._images.want(event.pipeline)
        try:
            self._in.send_nowait(event)
        except anyio.WouldBlock:
            self._lose("the broker is slower than the cameras")
        except anyio.ClosedResourceError:  # the node is ending, and its worker still says so
            self._lose("the node is ending")

    async def run(self) -> None:
        self._remembered = await to_thread.run_sync(self._read_memory)
        with self._in, self._out:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._send_events)
                tasks.start_soon(self._keep_so)
                if self._prefix:
                    tasks.start_soon(self._keep_images)

    async def _send_events(self) -> None:
        async for event in self._out:
            try:
                if event.kind in ("camera", "recording"):
                    await self._events.publish("pipeline", "info", {"pipeline": event.pipeline, "kind": event.kind, **event.data})
                elif event.kind == "unreachable":
                    await self._events.publish("pipeline", "warning", {"pipeline": event.pipeline, "kind": event.kind, **event.data})
                elif event.kind == "note":
                    await self._events.publish("pipeline", event.data["severity"], {"message": event.data["message"]})
                else:
                    await self._uplink.publish_data(event.pipeline, json.dumps({"v": 1, "kind": event.kind, **event.data}).encode())
            except (PublishRefused, ValueError) as error:  # refused by the broker, or what no message of ours may hold
                self._lose(str(error))

    async def _keep_so(self) -> None:
        """What is retained: states at most once a second, discovery more slowly; all of it anew after each reconnect."""
        announce_at_s = 0.0
        while True:
            if self._uplink.connection != self._connection:
                self._connection = self._uplink.connection
                self._stated.clear()
                self._told.clear()
                self._has_been_refused = False
                announce_at_s = 0.0
            if self._connection is not None:
                try:
                    await self._send_states()
                    if self._prefix:
                        await self._images.clear(self._stated)
                    if anyio.current_time() >= announce_at_s:
                        announce_at_s = anyio.current_time() + ANNOUNCE_EVERY * self._state_s
                        await self._announce()
                except LinkLost:
                    self._connection = None
                except PublishRefused as error:
                    self._refused(error)
            await anyio.sleep(self._state_s)

    async def _keep_images(self) -> None:
        """Apart from the states, which must not wait for a camera's next picture."""
        while True:
            await anyio.sleep(self._state_s)
            if self._connection is None:
                continue
            try:
                await self._images.renew([camera for camera, (report, _) in self._stated.items() if report.get("state") == "streaming"])
            except LinkLost:
                continue  # the states find out as well
            except PublishRefused as error:
                self._refused(error)

    def _refused(self, error: PublishRefused) -> None:
        if not self._has_been_refused:
            logger.warning("the broker does not take what cameras tell: %s; check its ACL for %s", error, self._node)
        self._has_been_refused = True

    async def _send_states(self) -> None:
        now_s = anyio.current_time()
        reports = {str(report["id"]): report for report in self._cameras()}
        for camera, report in reports.items():
            before, told_s = self._stated.get(camera, ({}, -FIGURES_EVERY_S))
            if has_news(before, report) or now_s - told_s >= FIGURES_EVERY_S:
                try:
                    payload = encode(camera_state(self._node, report))
                except (MessageError, ValueError) as error:  # a report that no message may hold
                    self._lose(str(error))
                    payload = None
                self._stated[camera] = (report, now_s)
                if payload is not None:
                    await self._retain(topics.camera_state(self._node, camera), payload)
        for camera in [camera for camera in self._stated if camera not in reports]:
            await self._retain(topics.camera_state(self._node, camera), b"")
            del self._stated[camera]

    async def _announce(self) -> None:
        """Discovery: what is new or changed, and an empty message for what is gone."""
        wanted = (
            {topic: payload for device in self._devices() for topic, payload in discovery(self._prefix, device).items()}
            if self._prefix
            else {}
        )
        gone = self._remembered - set(wanted)
        if (
            not set(wanted) <= self._remembered
        ):  # on the disk before it is on the broker: a kill in between must not leave it there for ever
            self._remembered |= set(wanted)
            await to_thread.run_sync(self._write_memory)
        for topic, payload in wanted.items():
            if self._told.get(topic) != payload:
                await self._uplink.publish_retained(topic, payload, 1)
                self._told[topic] = payload
        for topic in gone:
            await self._uplink.publish_retained(topic, b"", 1)
            self._told.pop(topic, None)
        if gone:
            self._remembered -= gone
            await to_thread.run_sync(self._write_memory)

    async def _retain(self, topic: str, payload: bytes) -> None:
        policy = POLICIES["camera-state"]
        await self._uplink.publish_retained(topic, payload, policy.qos, policy.expiry_s)

    def _read_memory(self) -> set[str]:
        try:
            return {str(topic) for topic in json.loads(self._memory.read_bytes())}
        except FileNotFoundError:
            return set()
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s cannot be read (%s): what Home Assistant was told before may stay there", self._memory, error)
            return set()

    def _write_memory(self) -> None:
        try:
            write_atomically(self._memory, json.dumps(sorted(self._remembered)).encode())
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._memory, error)

    def _lose(self, why: str) -> None:
        self.lost += 1
        if self.lost.bit_count() == 1:  # the 1st, 2nd, 4th, 8th …
            logger.warning("%d camera events are lost: %s", self.lost, why)
