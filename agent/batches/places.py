"""How many lines are asked at the same time, of all batches together; and how one is asked while no other is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio


class Places:
    """`most` of them; who comes first is first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._free = anyio.Semaphore(most)
        self._one_alone = anyio.Lock()

    @asynccontextmanager
    async def taken(self, is_alone: bool) -> AsyncIterator[None]:
        """One place; `is_alone`: all of them."""
        taken = 0
        try:
            async with AsyncExitStack() as turn:
                if is_alone:  # two that take all would wait for each other's
                    await turn.enter_async_context(self._one_alone)
                while taken < (self._most if is_alone else 1):
                    await self._free.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self._free.release()
