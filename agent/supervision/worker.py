"""A worker that is kept alive: started, asked, restarted with back-off, quarantined when that does not help."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager

import anyio

from agent.errors import WorkerLost, WorkerRefused
from agent.supervision.connection import Connection, Pending
from agent.supervision.exit_cause import ExitCause
from agent.supervision.incarnation import Incarnation, SupervisionSettings
from agent.supervision.restart import History, Quarantine, after_crash
from agent.supervision.state import BackingOff, Quarantined, Running, Starting, Stopped, WorkerState
from agent.worker_protocol import Done, Ready, Report, Request, Status, Tokens

LOG = logging.getLogger(__name__)

# The worker keeps the deadline of a request itself and says so; only if it does not, we give up a little later.
DEADLINE_GRACE_S = 2.0


def _ignore_report(report: Report, payload: bytes) -> None:
    pass


def _ignore_state(state: WorkerState) -> None:
    pass


class Worker:
    """`run` keeps one process alive; `call` and `stream` ask it. All from the event loop's thread.

    on_report  gets Status, CameraEvent and CameraFrame as they come; on_state gets every new state. Both are called from the reading
               task: they must return at once and not raise
    restarts   how often the process died, by kind of cause; for metrics
    """

    def __init__(
        self,
        name: str,
        command: tuple[str, ...],
        settings: SupervisionSettings | None = None,
        on_report: Callable[[Report, bytes], None] = _ignore_report,
        on_state: Callable[[WorkerState], None] = _ignore_state,
    ) -> None:
        self.name = name
        self.state: WorkerState = Stopped()
        self.status: Status | None = None
        self.last_cause: ExitCause | None = None
        self._command = command
        self._settings = settings or SupervisionSettings()
        self._on_report = on_report
        self._on_state = on_state
        self._connection: Connection | None = None
        self._incarnation = 0
        self._history = History()
        self._restarts: Counter[str] = Counter()
        self._changed = anyio.Event()
        self._asked_to_stop = anyio.Event()
        self._released = anyio.Event()
        self._finished = anyio.Event()

    @property
    def restarts(self) -> Mapping[str, int]:
        return self._restarts

    async def run(self) -> None:
        """Keep the worker alive until `stop` or cancellation, both of which leave no process behind. To be run once."""
        try:
            while not self._asked_to_stop.is_set():
                await self._live()
        finally:
            self._enter(Stopped())
            self._finished.set()

    async def stop(self) -> None:
        """Let the worker end what it does, at most `stop_s`, then end it; returns when `run` has."""
        self._asked_to_stop.set()
        self._released.set()
        with anyio.move_on_after(self._settings.stop_s + self._settings.abort_s + 10.0):
            await self._finished.wait()

    def release(self) -> None:
        """End a back-off or quarantine now."""
        self._history = History()
        if isinstance(self.state, Quarantined):
            self._enter(BackingOff(time.monotonic(), self.state.cause))
        self._released.set()

    async def until_running(self, deadline_s: float) -> Running:
        """Wait for the next or present incarnation. Raises WorkerLost when the deadline passes, or it is quarantined or stopped."""
        with anyio.move_on_after(deadline_s):
            while not isinstance(self.state, (Running, Quarantined)) and not self._asked_to_stop.is_set():
                await self._changed.wait()
        if isinstance(self.state, Running):
            return self.state
        raise WorkerLost(self.name, self._absence())

    async def call(self, message: Request, payload: bytes = b"", deadline_s: float = 30.0) -> tuple[Done, bytes]:
        """Ask and wait for the answer; `request` of the message is numbered here. A cancelled caller cancels the request.

        Raises WorkerLost, WorkerRefused (also when the deadline passes), ProtocolError if the request is too large.
        """
        with self._request() as (connection, pending):
            with anyio.move_on_after(deadline_s):
                await connection.send(pending, message, payload, deadline_s)
                while not isinstance(news := await pending.news(), Done):
                    pass
                return news, pending.payload
            raise WorkerRefused("deadline", f"{type(message).__name__} was not answered by the {self.name} worker within {deadline_s:g} s")

    async def stream(self, message: Request, payload: bytes = b"", deadline_s: float = 600.0) -> AsyncGenerator[Tokens | Done, None]:
        """Ask and yield Tokens as they come, then Done. Close it (`contextlib.aclosing`) when you stop early: that cancels the request.

        Tokens that the caller has not fetched are merged into one. Raises what `call` raises.
        """
        ends_at_s = time.monotonic() + deadline_s + DEADLINE_GRACE_S
        with self._request() as (connection, pending):
            with anyio.move_on_after(deadline_s):
                await connection.send(pending, message, payload, deadline_s)
            while True:
                news: Tokens | Done | None = None
                with anyio.move_on_after(max(0.0, ends_at_s - time.monotonic())):
                    news = await pending.news()
                if news is None:
                    raise WorkerRefused("deadline", f"the {self.name} worker did not end its answer within {deadline_s:g} s")
                yield news
                if isinstance(news, Done):
                    return

    @contextmanager
    def _request(self) -> Iterator[tuple[Connection, Pending]]:
        connection = self._connection
        if connection is None:
            raise WorkerLost(self.name, self._absence())
        pending = connection.open()
        try:
            yield connection, pending
        finally:
            connection.close(pending)

    def _absence(self) -> ExitCause:
        if self.last_cause is not None and not isinstance(self.state, Starting):
            return self.last_cause
        return ExitCause("stopped", "it is starting" if isinstance(self.state, Starting) else "it is not running")

    async def _live(self) -> None:
        self._incarnation += 1
        self._enter(Starting(time.monotonic(), self._incarnation))
        incarnation = Incarnation(self.name, self._command, self._settings, lambda ready: self._begin(incarnation, ready), self._take)
        try:
            cause = await incarnation.run(self._asked_to_stop)
        finally:
            self._connection = self.status = None
        self.last_cause = cause
        if self._asked_to_stop.is_set():
            return
        self._restarts[cause.kind] += 1
        now_s = time.monotonic()
        lived_s = 0.0 if incarnation.ready_at_s is None else now_s - incarnation.ready_at_s
        self._history, decision = after_crash(self._settings.restart, self._history, now_s, lived_s, random.random)
        if isinstance(decision, Quarantine):
            LOG.error("the %s worker is quarantined: %s", self.name, cause.text)
            await self._rest(Quarantined(decision.until_s, cause))
        else:
            LOG.warning("the %s worker is lost and starts again: %s", self.name, cause.text)
            await self._rest(BackingOff(decision.at_s, cause))

    async def _rest(self, state: BackingOff | Quarantined) -> None:
        if not self._asked_to_stop.is_set():
            self._released = anyio.Event()
        self._enter(state)
        with anyio.move_on_after(max(0.0, state.until_s - time.monotonic())):
            await self._released.wait()

    def _begin(self, incarnation: Incarnation, ready: Ready) -> None:
        self._connection = incarnation.connection
        self._enter(Running(ready.pid, time.monotonic(), self._incarnation, ready.python, ready.versions))

    def _take(self, report: Report, payload: bytes) -> None:
        if isinstance(report, Status):
            self.status = report
        self._on_report(report, payload)

    def _enter(self, state: WorkerState) -> None:
        self.state = state
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
        self._on_state(state)
