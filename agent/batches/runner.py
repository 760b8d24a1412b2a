"""Runs batches: looks their input up, asks line after line, a few at a time, and ends them. The one place with effects.

What is on the disk is the truth: a runner that begins anew goes on with whatever is not over, and asks no line that has its answer.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import anyio
from anyio import CancelScope, to_thread

from agent.batches.disk import until_written
from agent.batches.journal import InputLost, Journal, Lines
from agent.batches.line import Line, Reply, pause_s, was_lost
from agent.batches.places import Places
from agent.batches.record import NO_COUNTS, Batch, LineError, ended, failed, finalizing, validated
from agent.batches.store import BatchStore
from agent.batches.validation import validate

logger = logging.getLogger(__name__)

TICK_S = 1.0
TIDY_S = 60.0
GATE_S = 1.0
AT_THE_SAME_TIME = 4  # batches, each of another owner: who sends the second waits for the end of the first


class Ask(Protocol):
    """Answers one line of a batch on its endpoint."""

    async def __call__(self, batch: Batch, line: Line) -> Reply: ...


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """`lines`: of one file; `line_bytes`: of one line; `at_once`: lines that are asked at the same time, of all batches together."""

    lines: int = 50_000
    line_bytes: int = 8 << 20
    at_once: int = 4


class BatchRunner:
    """`may_run`: whether the node may answer now; while it may not, lines wait, and nothing else does. `tick_s`: how often it looks whether
    a window has passed or a batch was told to stop."""

    def __init__(self, store: BatchStore, ask: Ask, may_run: Callable[[], bool], limits: RunnerLimits, tick_s: float = TICK_S) -> None:
        self._store = store
        self._ask = ask
        self._may_run = may_run
        self._limits = limits
        self._tick_s = tick_s
        self._running: dict[str, CancelScope] = {}

    async def run(self) -> None:
        woken = anyio.Event()

        def wake() -> None:
            woken.set()

        self._store.on_change = wake
        places = Places(self._limits.at_once)
        tidied_s = -TIDY_S
        async with anyio.create_task_group() as tasks:
            while True:
                if anyio.current_time() - tidied_s >= TIDY_S:
                    tidied_s = anyio.current_time()
                    await self._tidy()
                for batch in self._store.unfinished():
                    if batch.status == "validating" and not self._store.is_late(batch):
                        await self._validate(batch)
                for batch in self._store.unfinished():
                    if self._is_to_start(batch):
                        tasks.start_soon(self._work, batch.id, places)
                with anyio.move_on_after(self._tick_s):
                    await woken.wait()
                woken = anyio.Event()

    def _is_to_start(self, batch: Batch) -> bool:
        """Whether its turn is now, or its end; then it counts as running. One that runs and is to end is told so."""
        is_to_end = batch.status == "cancelling" or self._store.is_late(batch)
        is_running = batch.id in self._running
        owners = {self._store.batches[name].owner for name in self._running}
        if not is_running and not is_to_end and (batch.owner in owners or len(self._running) >= AT_THE_SAME_TIME):
            return False
        scope = self._running.setdefault(batch.id, CancelScope())
        if is_to_end:
            scope.cancel()
        return not is_running

    async def _validate(self, batch: Batch) -> None:
        content = self._store.content(batch.input_file_id)
        check = partial(validate, content, batch.endpoint, self._limits.lines, self._limits.line_bytes)
        try:
            total, errors = await to_thread.run_sync(check, abandon_on_cancel=True)
        except Exception as error:  # noqa: BLE001 - told in the log and in the batch
            total, errors = 0, (_told(batch.id, error),)
        now = int(self._store.clock())
        becomes = partial(failed, errors=errors, now=now) if errors else partial(validated, total=total, now=now)
        await self._change(batch.id, becomes)

    async def _tidy(self) -> None:
        try:
            await self._store.tidy()
        except Exception as error:
            has_trace = not isinstance(error, OSError)
            logger.warning("old files of batches stay for now, until the next look: %s", error, exc_info=has_trace)

    # ── one batch ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _work(self, identifier: str, places: Places) -> None:
        store, batch = self._store, self._store.batches[identifier]
        output, errors = store.content(batch.output_id), store.content(batch.error_id)
        try:
            journal = await until_written(identifier, partial(to_thread.run_sync, Journal, batch, output, errors, store.has_room))
            try:
                store.live[identifier] = journal.counts
                with self._running[identifier]:
                    await self._answer_all(batch, journal, places)
                await self._end(identifier, journal)
            finally:
                store.live[identifier] = journal.counts
                with CancelScope(shield=True):
                    await to_thread.run_sync(journal.close)
        except Exception as error:  # noqa: BLE001 - one batch must not end the others, or the node
            await self._fail(identifier, _told(identifier, error))
        finally:
            del self._running[identifier]
            store.live.pop(identifier, None)
            store.on_change()

    async def _answer_all(self, batch: Batch, journal: Journal, places: Places) -> None:
        """Every line that has no answer yet. Raises InputLost."""
        window, writing = anyio.Semaphore(self._limits.at_once), anyio.Lock()
        lines = await to_thread.run_sync(self._lines, batch)

        def next_line() -> Line | InputLost | None:
            try:
                return next((line for line in lines if isinstance(line, Line) and not journal.is_done(line.number)), None)
            except InputLost as error:
                return error

        async def answer(line: Line) -> None:
            try:
                reply = await self._reply(batch, line, places)
                async with writing:
                    await until_written(batch.id, partial(to_thread.run_sync, journal.answer, line, reply))
                    self._store.live[batch.id] = journal.counts
            finally:
                window.release()

        try:
            async with anyio.create_task_group() as tasks:
                while True:
                    await window.acquire()  # so many lines are in memory, not more
                    line = await to_thread.run_sync(next_line)
                    if not isinstance(line, Line):
                        break
                    tasks.start_soon(answer, line)
        finally:
            lines.close()
        if isinstance(line, InputLost):
            raise line
        if (answered := journal.counts.answered) < batch.total:
            raise InputLost(f"it holds {answered} of the {batch.total} requests that it held")

    async def _reply(self, batch: Batch, line: Line, places: Places) -> Reply:
        attempts, is_suspect = 0, False
        while True:
            async with places.taken(is_alone=is_suspect):
                while not self._may_run():  # noqa: ASYNC110 - a gate is asked, it tells nobody when it opens
                    await anyio.sleep(GATE_S)
                reply = await self._ask(batch, line)
            attempts += self._may_run()  # what fails because the node is ending says nothing
            wait_s = pause_s(reply, attempts)
            if wait_s is None:
                return reply
            is_suspect = is_suspect or was_lost(reply)  # a line that kills its worker must not take others with it
            await anyio.sleep(wait_s * (1 + random.random() / 4))

    async def _end(self, identifier: str, journal: Journal) -> None:
        store, now = self._store, self._store.clock
        batch = store.batches[identifier]
        if batch.status == "cancelling" or store.is_late(batch):
            code = "batch_cancelled" if batch.status == "cancelling" else "batch_expired"
            await until_written(identifier, partial(to_thread.run_sync, self._leave, batch, journal, code))
        elif journal.counts.answered < batch.total:
            return  # it was late, and the clock was set back: the next look at it goes on
        else:
            await self._change(identifier, lambda batch: finalizing(batch, int(now())))
        has_output, has_errors = await self._add_outputs(batch)
        await self._change(identifier, lambda batch: ended(batch, journal.counts, has_output, has_errors, int(now())))
        logger.info("batch %s is %s", identifier, store.batches[identifier].status)

    async def _fail(self, identifier: str, why: LineError) -> None:
        store = self._store
        counts = store.live.get(identifier, NO_COUNTS)
        has_output, has_errors = await self._add_outputs(store.batches[identifier])
        await self._change(identifier, lambda batch: failed(batch, (why,), int(store.clock()), counts, has_output, has_errors))

    async def _add_outputs(self, batch: Batch) -> tuple[bool, bool]:
        """What was answered, and what was refused: whether there is any."""
        add = self._store.add_output
        has_output = await until_written(batch.id, partial(add, batch, batch.output_id, "output"))
        return has_output, await until_written(batch.id, partial(add, batch, batch.error_id, "error"))

    def _leave(self, batch: Batch, journal: Journal, code: str) -> None:
        lines = self._lines(batch)
        try:
            journal.leave(lines, code)
        finally:
            lines.close()

    def _lines(self, batch: Batch) -> Lines:
        """Raises InputLost. What was within the limit when it was looked through counts, whatever the limit is now."""
        most = sys.maxsize if batch.total else self._limits.lines
        return Lines(self._store.content(batch.input_file_id), batch.endpoint, most, self._limits.line_bytes)

    # ── the disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _change(self, identifier: str, transition: Callable[[Batch], Batch]) -> None:
        await until_written(identifier, partial(self._store.change, identifier, transition))


def _told(batch: str, error: Exception) -> LineError:
    """Why a batch failed, for its log and its record."""
    if isinstance(error, InputLost):
        return LineError(code="input_file_lost", message=f"The input file cannot be read on this node: {error}.")
    logger.error("batch %s failed", batch, exc_info=error)
    return LineError(code="internal_error", message="The node failed on this batch; its log has the cause.")
