"""A worker as the operating system sees it: spawned, listened to, signalled, waited for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import anyio

from agent.supervision.exit_cause import EVIDENCE_LINES

LOG = logging.getLogger(__name__)

WORKER = Path(__file__).resolve().parent.parent / "worker" / "__main__.py"
LINE_CHARACTERS = 2000
LINES_PER_S = 20


def worker_command(python: Path | str = sys.executable) -> tuple[str, ...]:
    """What starts a worker under the interpreter that has the device's runtime."""
    return (str(python), str(WORKER))


class Process:
    """One running child in a session of its own; `connection` is our end of its socket."""

    def __init__(self, name: str, child: asyncio.subprocess.Process, connection: socket.socket, output: asyncio.StreamReader,
                 transport: asyncio.ReadTransport) -> None:  # fmt: skip
        self.pid = child.pid
        self.connection = connection
        self.evidence: deque[str] = deque(maxlen=EVIDENCE_LINES)
        self._name = name
        self._child = child
        self._output = output
        self._transport = transport

    async def wait(self) -> int:
        """The exit status; negative is a signal."""
        return await self._child.wait()

    async def log_output(self) -> None:
        """Log what the process writes, line by line, until every holder of the pipe is gone. More than LINES_PER_S are dropped and
        counted; the evidence keeps the last ones in any case."""
        rest = ""
        second, logged, dropped = 0, 0, 0
        while chunk := await self._output.read(4096):
            *lines, rest = (rest + chunk.decode(errors="replace")).split("\n")
            rest = rest[:LINE_CHARACTERS]
            for line in lines:
                self.evidence.append(line[:LINE_CHARACTERS])
                if int(time.monotonic()) != second:
                    second, logged = int(time.monotonic()), 0
                    if dropped:
                        LOG.info("%s: %d lines left out", self._name, dropped)
                        dropped = 0
                if logged < LINES_PER_S:
                    LOG.info("%s: %s", self._name, line[:LINE_CHARACTERS])
                    logged += 1
                else:
                    dropped += 1
        if rest:
            self.evidence.append(rest)

    def signal(self, number: signal.Signals) -> None:
        """Signal the worker alone, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the worker and whatever it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Leave nothing behind: kill what still lives, reap it, close the pipe. Not to be interrupted by cancellation."""
        self.kill()
        with anyio.move_on_after(timeout_s, shield=True):
            await self._child.wait()
        self._transport.close()


async def spawn(name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Process:
    """Start `command FD NAME` with a socket to us as FD. Raises OSError."""
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    output = asyncio.StreamReader()
    try:
        ours.setblocking(False)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(read_end, "rb", 0)
        )
        try:
            child = await asyncio.create_subprocess_exec(
                *command, str(theirs.fileno()), name,
                stdin=asyncio.subprocess.DEVNULL, stdout=write_end, stderr=write_end,
                pass_fds=(theirs.fileno(),), start_new_session=True, env=_environment(command[0], environment),
            )  # fmt: skip
        except BaseException:
            transport.close()
            raise
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(write_end)
    return Process(name, child, ours, output, transport)


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since boot, those of cgroup limits too; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _environment(python: str, given: Mapping[str, str] | None) -> dict[str, str]:
    """Ours, less what would lead another interpreter to the packages of this one."""
    environment = dict(os.environ if given is None else given)
    if python != sys.executable:
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            environment.pop(name, None)
    return {**environment, "PYTHONUNBUFFERED": "1"}
