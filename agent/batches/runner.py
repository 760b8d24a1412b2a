"""Runs batches: looks their input up, asks line after line, a few at a time, and ends them. The one place with effects.

What is on the disk is the truth: a runner that begins anew goes on with whatever is not over, and asks no line that has its answer.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import anyio
from anyio import CancelScope, to_thread

from agent.batches.journal import Journal, Lines
from agent.batches.line import Line, Reply, pause_s, was_lost
from agent.batches.places import Places
from agent.batches.record import Batch, LineError, ended, failed, finalizing, validated
from agent.batches.store import BatchStore
from agent.batches.validation import validate

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TICK_S = 1.0
TIDY_S = 60.0
GATE_S = 1.0
AT_THE_SAME_TIME = 4  # batches, each of another owner: who sends the second waits for the end of the first
DISK_S = (0.5, 30.0)


class InputLost(Exception):
    """The input of a batch cannot be read any more."""


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
                    await self._until_written("old files", self._store.tidy)
                for batch in self._store.unfinished():
                    if batch.status == "validating" and not batch.is_late(self._store.clock()):
                        await self._validate(batch)
                for batch in self._store.unfinished():
                    if self._is_to_start(batch):
                        tasks.start_soon(self._work, batch.id, places)
                with anyio.move_on_after(self._tick_s):
                    await woken.wait()
                woken = anyio.Event()

    def _is_to_start(self, batch: Batch) -> bool:
        """Whether its turn is now, or its end; then it counts as running. One that runs and is to end is told so."""
        is_to_end = batch.status == "cancelling" or batch.is_late(self._store.clock())
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
        except OSError as error:
            total, errors = 0, (_lost(InputLost(error.strerror)),)
        now = int(self._store.clock())
        becomes = partial(failed, errors=errors, now=now) if errors else partial(validated, total=total, now=now)
        await self._change(batch.id, becomes)

    # ── one batch ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _work(self, identifier: str, places: Places) -> None:
        store, batch = self._store, self._store.batches[identifier]
        output, errors = store.content(batch.output_id), store.content(batch.error_id)
        try:
            journal = await self._until_written(identifier, partial(to_thread.run_sync, Journal, batch, output, errors, store.has_room))
            try:
                store.live[identifier] = journal.counts
                with self._running[identifier]:
                    await self._answer_all(batch, journal, places)
                await self._end(identifier, journal)
            finally:
                with CancelScope(shield=True):
                    await to_thread.run_sync(journal.close)
        except InputLost as error:
            await self._change(identifier, partial(failed, errors=(_lost(error),), now=int(store.clock())))
        finally:
            del self._running[identifier]
            store.live.pop(identifier, None)
            store.on_change()

    async def _answer_all(self, batch: Batch, journal: Journal, places: Places) -> None:
        """Every line that has no answer yet. Raises InputLost."""
        window, writing = anyio.Semaphore(self._limits.at_once), anyio.Lock()
        lines = await to_thread.run_sync(self._lines, batch)

        def next_line() -> Line | OSError | None:
            try:
                return next((line for line in lines if isinstance(line, Line) and not journal.is_done(line.number)), None)
            except OSError as error:
                return error

        async def answer(line: Line) -> None:
            try:
                reply = await self._reply(batch, line, places)
                async with writing:
                    await self._until_written(batch.id, partial(to_thread.run_sync, journal.answer, line, reply))
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
        if isinstance(line, OSError):
            raise InputLost(line.strerror) from line

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
        if batch.status == "cancelling" or batch.is_late(now()):
            code = "batch_cancelled" if batch.status == "cancelling" else "batch_expired"
            await self._until_written(identifier, partial(to_thread.run_sync, self._leave, batch, journal, code))
        elif journal.counts.answered < batch.total:
            return  # the clock was set back: the next look at it goes on
        else:
            await self._change(identifier, lambda batch: finalizing(batch, int(now())))
        await self._until_written(identifier, partial(to_thread.run_sync, journal.sync))
        has_output = await self._until_written(identifier, partial(store.add_output, batch, batch.output_id, "output"))
        has_errors = await self._until_written(identifier, partial(store.add_output, batch, batch.error_id, "error"))
        await self._change(identifier, lambda batch: ended(batch, journal.counts, has_output, has_errors, int(now())))
        logger.info("batch %s is %s", identifier, store.batches[identifier].status)

    def _leave(self, batch: Batch, journal: Journal, code: str) -> None:
        lines = self._lines(batch)
        try:
            journal.leave(lines, code)
        finally:
            lines.close()

    def _lines(self, batch: Batch) -> Lines:
        """Raises InputLost."""
        try:
            return Lines(self._store.content(batch.input_file_id), batch.endpoint, self._limits.lines, self._limits.line_bytes)
        except OSError as error:
            raise InputLost(error.strerror) from error

    # ── the disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _change(self, identifier: str, transition: Callable[[Batch], Batch]) -> None:
        await self._until_written(identifier, partial(self._store.change, identifier, transition))

    async def _until_written(self, what: str, call: Callable[[], Awaitable[Result]]) -> Result:
        """A full disk is waited for: what is on it stays, and the answer in hand is not thrown away."""
        wait_s, most_s = DISK_S
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


def _lost(error: InputLost) -> LineError:
    return LineError(code="input_file_lost", message=f"The input file cannot be read on this node: {error}.")
