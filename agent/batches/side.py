"""The batches of one node, put together from its configuration; agent/main.py starts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio

from agent.batches.retention import Keep
from agent.batches.runner import Ask, BatchRunner, RunnerLimits
from agent.batches.store import BatchStore, StoreLimits
from agent.config import BatchSettings
from agent.mode import Allowed, Refused
from agent.protocol.wire import wire_now

DAY_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class BatchSide:
    """`run` goes on with what was not over when the node ended."""

    store: BatchStore
    limits: RunnerLimits

    async def run(self, ask: Ask, gate: Callable[[], Allowed | Refused], closing: anyio.Event) -> None:
        """Until it is cancelled. While `gate` refuses, and once `closing` is set, lines wait."""

        def may_run() -> bool:
            return not closing.is_set() and isinstance(gate(), Allowed)

        await BatchRunner(self.store, ask, may_run, self.limits).run()


def open_batches(settings: BatchSettings, state: Path, clock_is_synced: Callable[[], bool]) -> BatchSide:
    """Reads the records; blocks. Raises OSError."""
    keep = Keep(round(settings.budget_mb * (1 << 20)), round(settings.keep_days * DAY_S))
    limits = StoreLimits(round(settings.file_mb * (1 << 20)), keep, round(settings.keep_free_mb * (1 << 20)))
    store = BatchStore(state / "batches", limits, lambda: wire_now().timestamp(), clock_is_synced)
    store.open()
    return BatchSide(store, RunnerLimits(lines=settings.lines, at_once=settings.at_once))
