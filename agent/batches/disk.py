"""Waiting for a disk that takes nothing."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WAIT_S = (0.5, 30.0)


async def until_written(what: str, call: Callable[[], Awaitable[Result]]) -> Result:
    """A full disk is waited for: what is on it stays, and the answer in hand is not thrown away."""
    wait_s, most_s = WAIT_S
    has_told = False
    while True:
        try:
            result = await call()
        except OSError as error:
            if not has_told:
                logger.warning("batches wait for the disk (%s): %s; make room in the state folder", what, error.strerror)
            has_told = True
        else:
            if has_told:
                logger.info("batches go on: the disk takes them again (%s)", what)
            return result
        await anyio.sleep(wait_s)
        wait_s = min(most_s, 2 * wait_s)
