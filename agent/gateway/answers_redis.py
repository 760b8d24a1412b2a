"""Kept answers in Redis or Valkey, which nodes may share. A dead one costs one deadline and one line of the log, until it is back; a full
one is read from, and asked from time to time whether it takes answers again."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import redis.asyncio as redis
from redis.exceptions import RedisError, ResponseError

logger = logging.getLogger(__name__)

PREFIX = "hotspare:answer:"
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 15.0
PING_S = 1.0
FULL_S = 15.0  # between two attempts to write to one that refuses it


class RedisAnswers:
    """`get` and `put` never raise and take `deadline_s` at most; after a failure they ask nothing until `run` has had an answer again."""

    def __init__(self, url: str, deadline_s: float) -> None:
        self._client = redis.Redis.from_url(
            url, socket_timeout=PING_S, socket_connect_timeout=PING_S, max_connections=32, retry_on_timeout=False, health_check_interval=0
        )
        self._deadline_s = deadline_s
        self._is_well = True
        self._fell = anyio.Event()
        self._takes = True
        self._write_again_s = float("-inf")

    async def get(self, key: str) -> bytes | None:
        try:
            found = await self._ask(lambda: self._client.get(PREFIX + key), self._deadline_s)
        except ResponseError as error:
            self._fall(error)
            return None
        return found if isinstance(found, bytes) else None

    async def put(self, key: str, answer: bytes, ttl_s: float) -> None:
        if not self._is_well or time.monotonic() < self._write_again_s:
            return
        try:
            taken = await self._ask(lambda: self._client.set(PREFIX + key, answer, px=max(1, int(1000 * ttl_s))), 10 * self._deadline_s)
        except ResponseError as error:  # it is there, and refuses: out of memory, a replica, a rule
            self._write_again_s = time.monotonic() + FULL_S
            if self._takes:
                self._takes = False
                logger.warning("Redis takes no answers, and those that it has still count: %s", error)
            return
        if taken and not self._takes:
            self._takes = True
            logger.info("Redis takes answers again")

    async def run(self) -> None:
        try:
            while True:
                await self._fell.wait()
                pause_s = FIRST_PAUSE_S
                while not await self._is_back():
                    await anyio.sleep(pause_s * (0.5 + 0.5 * random.random()))
                    pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
                self._fell = anyio.Event()
                self._is_well = True
                logger.info("Redis answers again: answers are kept")
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(PING_S):
                await self._client.aclose()

    async def _is_back(self) -> bool:
        try:
            with anyio.fail_after(PING_S):
                await self._client.get(PREFIX)
        except (RedisError, OSError, TimeoutError):
            return False
        return True

    async def _ask(self, call: Callable[[], Awaitable[Any]], deadline_s: float) -> Any:
        """None where it does not answer. Raises ResponseError where it refuses."""
        if not self._is_well:
            return None
        try:
            with anyio.fail_after(deadline_s):
                return await call()
        except ResponseError:
            raise
        except (RedisError, OSError, TimeoutError) as error:
            self._fall(str(error) or f"no answer in {1000 * deadline_s:g} ms")
            return None

    def _fall(self, reason: object) -> None:
        if self._is_well:  # of all that wait for it at the same time, the first one tells
            self._is_well = False
            self._fell.set()
            logger.warning("Redis does not answer, and answers are not kept until it does: %s", reason)
