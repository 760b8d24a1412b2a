"""Private programs: what is missing, dies or does not answer is named; odd folders are no obstacle; nothing is left behind."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import anyio
import pytest

from agent.demo.programs import ProgramError, find, free_port, program, until_ended, write_mosquitto, write_nginx
from tests.stories.house import needs_programs

pytestmark = pytest.mark.anyio

LISTEN = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(600)"


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(ProgramError, match="mosquitto-nonesuch is not installed; `apt-get install mosquitto-nonesuch`"):
        find("mosquitto-nonesuch")


def test_a_port_that_another_program_has_is_not_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port(port) not in (0, port)


async def test_a_program_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "broker.log"
    with pytest.raises(ProgramError, match=r"broker ended with status 3(.|\n)*out of luck"):
        async with program([sys.executable, "-c", "print('out of luck', flush=True); raise SystemExit(3)"], log, free_port()):
            pass


async def test_a_program_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="none cannot be started"):
        async with program([str(tmp_path / "none")], tmp_path / "log"):
            pass


async def test_a_program_and_its_children_end_with_the_block(tmp_path: Path) -> None:
    child = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    log = tmp_path / "parent.log"
    async with program([sys.executable, "-c", child], log) as process:
        with anyio.fail_after(20):
            while not log.read_text().strip():  # noqa: ASYNC110 - what is waited for lies in another process
                await anyio.sleep(0.02)
    assert process.returncode is not None
    with anyio.fail_after(10):
        while _lives(int(log.read_text())):  # noqa: ASYNC110 - as above
            await anyio.sleep(0.02)


async def test_the_end_of_a_running_program_is_noticed(tmp_path: Path) -> None:
    log, port = tmp_path / "server.log", free_port()
    async with program([sys.executable, "-c", LISTEN, str(port)], log, port) as process:
        process.kill()
        with anyio.fail_after(10), pytest.raises(ProgramError, match="server ended by itself with status -9"):
            await until_ended("server", process, log)


@needs_programs
async def test_broker_and_balancer_run_in_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / 'a b "c" [d] \\e'
    (folder / "nginx").mkdir(parents=True)
    front, broker = free_port(), free_port()
    snippet = folder / "nginx" / "hotspare.conf"
    snippet.write_text(f"server {{ listen 127.0.0.1:{front}; return 204; }}\n")
    async with (
        program(write_mosquitto(folder / "broker", broker), tmp_path / "mosquitto.log", broker),
        program(write_nginx(folder / "nginx", snippet), tmp_path / "nginx.log", front),
    ):
        stream = await anyio.connect_tcp("127.0.0.1", front)
        async with stream:
            await stream.send(b"GET / HTTP/1.0\r\n\r\n")
            assert b" 204 " in await stream.receive()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
