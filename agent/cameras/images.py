"""The retained picture of each camera, for Home Assistant: fresh soon after something was seen, and now and then anyway; never one that
shows what is masked by now."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, Protocol

import anyio

from agent.errors import AgentError
from agent.link.broker import LinkLost, PublishRefused
from agent.protocol import topics
from agent.protocol.topics import POLICIES

PICTURE_S = 3.0  # a camera that gives none within this is asked again at its next turn


class Pictures(Protocol):
    """Where they come from."""

    def masks(self, camera: str) -> Any:
        """What is wanted to be masked in its pictures."""
        ...

    def is_as_wanted(self, camera: str) -> bool:
        """Whether the worker does what is wanted of the camera by now, so that its next picture is masked so."""
        ...

    async def small(self, camera: str) -> bytes:
        """Its next picture as JPEG, of a size that a message may have. Raises AgentError."""
        ...


class Retained(Protocol):
    async def publish_retained(self, topic: str, payload: bytes, qos: Literal[0, 1], expiry_s: int | None = None) -> None: ...


class Images:
    """`pause_s`: between two pictures of a camera, at least; `idle_s`: at most, while nothing is seen. Methods raise LinkLost and
    PublishRefused."""

    def __init__(self, node: str, uplink: Retained, pictures: Pictures, pause_s: float, idle_s: float) -> None:
        self._node = node
        self._uplink = uplink
        self._pictures = pictures
        self._pause_s = pause_s
        self._idle_s = idle_s
        self._masks: dict[str, Any] = {}  # with which the retained pictures were made
        self._sent_s: dict[str, float] = {}
        self._wanted: set[str] = set()

    def want(self, camera: str) -> None:
        """Something was seen by it."""
        self._wanted.add(camera)

    async def clear(self, cameras: Collection[str]) -> None:
        """Take away what was made with other masks, be it by an earlier process of this node, and what is of no camera any more."""
        for camera in cameras:
            masks = self._pictures.masks(camera)
            if camera not in self._masks or self._masks[camera] != masks:
                self._masks.pop(camera, None)
                await self._retain(camera, b"")
                self._masks[camera] = masks
                self._sent_s.pop(camera, None)
        for camera in set(self._masks) - set(cameras):
            del self._masks[camera]
            self._sent_s.pop(camera, None)
            await self._retain(camera, b"")

    async def renew(self, streaming: Collection[str]) -> None:
        """Send a fresh picture of each camera whose time it is."""
        self._wanted &= set(self._masks)
        due = [camera for camera in streaming if camera in self._masks and self._is_due(camera)]
        failures: list[LinkLost | PublishRefused] = []

        async def send(camera: str) -> None:
            try:
                await self._send(camera)
            except (LinkLost, PublishRefused) as error:
                failures.append(error)

        async with anyio.create_task_group() as tasks:
            for camera in due:
                tasks.start_soon(send, camera)
        if failures:
            raise failures[0]

    def _is_due(self, camera: str) -> bool:
        past_s = anyio.current_time() - self._sent_s.get(camera, float("-inf"))
        return past_s >= (self._pause_s if camera in self._wanted else self._idle_s)

    async def _send(self, camera: str) -> None:
        masks = self._masks[camera]
        if not self._is_masked(camera, masks):
            return
        jpeg = b""
        try:
            with anyio.move_on_after(PICTURE_S):
                jpeg = await self._pictures.small(camera)
        except AgentError:  # its health says why
            return
        if jpeg and self._is_masked(camera, masks):  # else an order came meanwhile, and the picture may be from before it
            self._sent_s[camera] = anyio.current_time()
            self._wanted.discard(camera)
            await self._retain(camera, jpeg)

    def _is_masked(self, camera: str, masks: Any) -> bool:
        """Whether the camera's next picture is masked as the retained one may be."""
        is_so = camera in self._masks and self._masks[camera] == masks == self._pictures.masks(camera)
        return is_so and self._pictures.is_as_wanted(camera)

    async def _retain(self, camera: str, payload: bytes) -> None:
        policy = POLICIES["camera-image"]
        await self._uplink.publish_retained(topics.camera_image(self._node, camera), payload, policy.qos, policy.expiry_s)
