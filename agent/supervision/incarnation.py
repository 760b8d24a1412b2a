"""One process of a worker from spawn to exit cause: wait until it is ready, converse, watch its pulse, end it."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio

from agent.supervision.connection import Connection
from agent.supervision.exit_cause import EndedFor, ExitCause, exit_cause, spawn_failure
from agent.supervision.process import Process, oom_kills, spawn
from agent.supervision.restart import RestartPolicy
from agent.worker_protocol import ProtocolError, Ready, Report, Status

LOG = logging.getLogger(__name__)

EXIT_AFTER_EOF_S = 6.0  # a little over the worker's own EXIT_GRACE_S
LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class SupervisionSettings:
    """ready_s: from spawn to Ready, imports on a slow disk included. hang_s: silence of the loop that counts as a hang. abort_s: from
    SIGABRT, which makes it write its stacks, to SIGKILL. stop_s: from Shutdown to SIGKILL. in_flight: requests open at once."""

    ready_s: float = 60.0
    hang_s: float = 120.0
    abort_s: float = 5.0
    stop_s: float = 10.0
    in_flight: int = 256
    restart: RestartPolicy = field(default_factory=RestartPolicy)


class Incarnation:
    """`run` once. `connection` is usable from `on_ready` until `run` returns."""

    def __init__(
        self,
        name: str,
        command: tuple[str, ...],
        settings: SupervisionSettings,
        on_ready: Callable[[Ready], None],
        on_report: Callable[[Report, bytes], None],
    ) -> None:
        self.connection: Connection | None = None
        self.ready_at_s: float | None = None
        self._name = name
        self._command = command
        self._settings = settings
        self._on_ready = on_ready
        self._on_report = on_report
        self._ended_for: EndedFor | None = None
        self._has_reported = False

    async def run(self, asked_to_stop: anyio.Event) -> ExitCause:
        """Returns when the process is gone; by then every open request has ended with that cause."""
        kills_before = oom_kills()
        try:
            process = await spawn(self._name, self._command)
        except OSError as error:
            return spawn_failure(error, self._command[0])
        cause = ExitCause("stopped", "the supervisor ended")
        try:
            reader, writer = await asyncio.open_connection(sock=process.connection)
            self.connection = connection = Connection(self._name, reader, writer, self._settings.in_flight)
            has_spoken, is_ready = anyio.Event(), anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._log_output, process, has_spoken)
                tasks.start_soon(self._converse, process, connection, is_ready)
                tasks.start_soon(self._watch, process, connection, is_ready)
                tasks.start_soon(self._stop, process, connection, asked_to_stop)
                status = await process.wait()
                process.kill()  # what it has started and left behind holds the pipe, maybe the camera
                with anyio.move_on_after(LAST_WORDS_S):
                    await has_spoken.wait()
                tasks.cancel_scope.cancel()
            cause = exit_cause(status, tuple(process.evidence), self._ended_for, oom_kills() - kills_before, self._command[0])
        finally:
            if self.connection is not None:
                self.connection.lose(cause)
            await process.close()
        return cause

    @staticmethod
    async def _log_output(process: Process, has_spoken: anyio.Event) -> None:
        await process.log_output()
        has_spoken.set()

    async def _converse(self, process: Process, connection: Connection, is_ready: anyio.Event) -> None:
        def take(report: Report, payload: bytes) -> None:
            if isinstance(report, Ready):
                self.ready_at_s = time.monotonic()
                is_ready.set()
                self._on_ready(report)
                return
            if isinstance(report, Status):
                self._has_reported = True
            self._on_report(report, payload)

        try:
            await connection.read(take)
        except ProtocolError as error:
            LOG.error("%s worker: %s", self._name, error)  # noqa: TRY400  # the message is all there is to know
            await self._end(process, "protocol")
            return
        await anyio.sleep(EXIT_AFTER_EOF_S)
        await self._end(process, "hang")

    async def _watch(self, process: Process, connection: Connection, is_ready: anyio.Event) -> None:
        """Silence is counted in ticks of our own loop: if it is the daemon that was stopped or suspended, one tick is all that passes."""
        with anyio.move_on_after(self._settings.ready_s):
            await is_ready.wait()
        if self.ready_at_s is None:
            await self._end(process, "not_ready")
            return
        tick_s = min(1.0, self._settings.hang_s / 8)
        silent_s = 0.0
        while silent_s < self._settings.hang_s:
            await anyio.sleep(tick_s)
            silent_s = 0.0 if self._has_reported or connection.is_in_long_step() else silent_s + tick_s
            self._has_reported = False
        await self._end(process, "hang")

    async def _stop(self, process: Process, connection: Connection, asked_to_stop: anyio.Event) -> None:
        await asked_to_stop.wait()
        self._ended_for = self._ended_for or "stopped"
        connection.shut_down()
        await anyio.sleep(self._settings.stop_s)  # the exit of the process cancels this
        LOG.warning("the %s worker did not stop within %g s and is killed", self._name, self._settings.stop_s)
        process.kill()

    async def _end(self, process: Process, ended_for: EndedFor) -> None:
        if self._ended_for is not None:
            return
        self._ended_for = ended_for
        process.signal(signal.SIGABRT)
        await anyio.sleep(self._settings.abort_s)
        process.kill()
