"""Programs of the distribution that the demo runs privately: mosquitto and nginx, each in a folder of its own on a port of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL

import anyio
from anyio.abc import Process

START_DEADLINE_S = 15.0
STOP_DEADLINE_S = 10.0


class ProgramError(RuntimeError):
    """A program is missing or does not start; the message says which, why and how to get it."""


def find(name: str) -> str:
    """The path of a program; Debian keeps daemons in /usr/sbin, which users often lack in PATH."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if path is None:
        raise ProgramError(f"{name} is not installed; `apt-get install {name}` (Debian, Ubuntu) brings it")
    return path


def free_port(preferred: int = 0, host: str = "127.0.0.1") -> int:
    """`preferred` if nobody listens there, else a free one."""
    for port in (preferred, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    raise ProgramError(f"no free port on {host}")


@asynccontextmanager
async def program(
    command: Sequence[str], log: Path, port: int | None = None, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Process]:
    """Run `command` in a process group of its own, its output in `log`; ready once `port` answers; ended with SIGTERM, then SIGKILL."""
    with log.open("ab") as out:
        process = await anyio.open_process(
            list(command), stdin=DEVNULL, stdout=out, stderr=out, start_new_session=True, env={**os.environ, **(environment or {})}
        )
        try:
            if port is not None:
                await _answering(process, port, command[0], log)
            yield process
        finally:
            with anyio.CancelScope(shield=True):
                await _stop(process)


async def _answering(process: Process, port: int, name: str, log: Path) -> None:
    with anyio.move_on_after(START_DEADLINE_S):
        while process.returncode is None:
            with contextlib.suppress(OSError):
                await (await anyio.connect_tcp("127.0.0.1", port)).aclose()
                return
            await anyio.sleep(0.05)
    tail = (await anyio.Path(log).read_text(errors="replace")).strip()[-600:]
    raise ProgramError(f"{name} does not answer on port {port}; its log {log} ends with:\n{tail}")


async def _stop(process: Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    with anyio.move_on_after(STOP_DEADLINE_S):
        await process.wait()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def write_mosquitto(folder: Path, port: int) -> list[str]:
    """Configuration of a private broker on loopback; returns the command. TCP_NODELAY is worth two orders of magnitude in latency."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mosquitto.conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nmax_keepalive 60\nmax_packet_size 131072\n"
        f"max_queued_messages 1000\npersistence false\nlog_type warning\nlog_type error\n"
    )
    return [find("mosquitto"), "-c", str(folder / "mosquitto.conf")]


def write_nginx(folder: Path, snippet: Path) -> list[str]:
    """Configuration of a private nginx that includes the coordinator's snippet; returns the command that runs it in the foreground."""
    for name in ("body", "proxy", "fastcgi", "uwsgi", "scgi"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    user = "user root;\n" if os.geteuid() == 0 else ""  # its temporary folders are this user's
    paths = "".join(f"  {name}_temp_path {folder / part};\n" for name, part in _TEMPORARY.items())
    (folder / "nginx.conf").write_text(
        f"{user}pid {folder / 'nginx.pid'};\nerror_log {folder / 'error.log'} warn;\nworker_processes 1;\n"
        "events { worker_connections 512; }\n"
        f"http {{\n  access_log off;\n{paths}  include {snippet};\n}}\n"
    )
    return [*nginx_command(folder), "-g", "daemon off;"]


def nginx_command(folder: Path) -> list[str]:
    return [find("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]


_TEMPORARY = {"client_body": "body", "proxy": "proxy", "fastcgi": "fastcgi", "uwsgi": "uwsgi", "scgi": "scgi"}
