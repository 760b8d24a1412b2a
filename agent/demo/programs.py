"""Programs of the distribution that the demo runs privately: mosquitto and nginx, each in a folder of its own on a port of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL
from typing import NoReturn

import anyio
from anyio.abc import Process

START_DEADLINE_S = 15.0
STOP_DEADLINE_S = 25.0  # a node lets its answers end, then its workers


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
    """Run `command` in a process group of its own, its output in `log`, a file of its name; ready once `port` answers. At the end it gets
    SIGTERM, and whatever is left of its group SIGKILL."""
    with log.open("ab") as out:
        try:
            process = await anyio.open_process(
                list(command), stdin=DEVNULL, stdout=out, stderr=out, start_new_session=True, env={**os.environ, **(environment or {})}
            )
        except OSError as error:
            raise ProgramError(f"{command[0]} cannot be started: {error.strerror}") from error
        try:
            if port is not None:
                await _answering(process, port, log.stem, log)
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
    what = f"does not answer on port {port}" if process.returncode is None else f"ended with status {process.returncode}"
    raise ProgramError(f"{name} {what}; its log {log} ends with:\n{await _tail(log)}")


async def until_ended(name: str, process: Process, log: Path) -> NoReturn:
    """Raises ProgramError when the program ends by itself."""
    status = await process.wait()
    raise ProgramError(f"{name} ended by itself with status {status}; its log {log} ends with:\n{await _tail(log)}")


async def _tail(log: Path) -> str:
    return (await anyio.Path(log).read_text(errors="replace")).strip()[-600:] or "nothing"


async def _stop(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with anyio.move_on_after(STOP_DEADLINE_S):
            await process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # and what it has left behind
    with anyio.move_on_after(STOP_DEADLINE_S):
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
    paths = "".join(f"  {name}_temp_path {_quoted(folder / part)};\n" for name, part in _TEMPORARY.items())
    # nginx takes the name for a pattern, but only if there is one of these in it.
    pattern = re.sub(r"([*?[\\])", r"\\\1", str(snippet)) if set("*?[") & set(str(snippet)) else snippet
    (folder / "nginx.conf").write_text(
        f"{user}pid {_quoted(folder / 'nginx.pid')};\nerror_log {_quoted(folder / 'error.log')} warn;\nworker_processes 1;\n"
        "events { worker_connections 512; }\n"
        f"http {{\n  access_log off;\n{paths}  include {_quoted(pattern)};\n}}\n"
    )
    return [*nginx_command(folder), "-g", "daemon off;"]


def nginx_command(folder: Path) -> list[str]:
    """nginx on the folder's configuration. Before 1.19.5, in Ubuntu's of JetPack 5 and 6, it cannot be told where to complain at first."""
    nginx = find("nginx")
    log = ["-e", str(folder / "error.log")] if _nginx_version(nginx) >= (1, 19, 5) else []
    return [nginx, "-p", str(folder), "-c", str(folder / "nginx.conf"), *log]


@functools.cache
def _nginx_version(nginx: str) -> tuple[int, ...]:
    try:
        said = subprocess.run([nginx, "-v"], stdin=DEVNULL, capture_output=True, text=True, timeout=10, check=False).stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramError(f"{nginx} does not run: {error}") from error
    found = re.search(r"/(\d+)\.(\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else (0,)


def _quoted(path: Path | str) -> str:
    """A path as nginx reads it: with spaces, quotes and backslashes."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


_TEMPORARY = {"client_body": "body", "proxy": "proxy", "fastcgi": "fastcgi", "uwsgi": "uwsgi", "scgi": "scgi"}
