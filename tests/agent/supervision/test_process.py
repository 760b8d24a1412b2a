from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest

from agent.supervision.process import spawn, worker_command
from agent.supervision.state import Running
from agent.supervision.worker import Worker
from agent.worker_protocol import HEADER, Ready, decode_message, frame_lengths
from tests.agent.supervision.running import until

ROOT = Path(__file__).resolve().parents[3]

PARENT = """
import subprocess, socket, sys, time
ours, theirs = socket.socketpair()
child = subprocess.Popen([sys.executable, "agent/worker/__main__.py", str(theirs.fileno()), "orphan"], pass_fds=[theirs.fileno()],
                         start_new_session=True)
ours.recv(1)
print(child.pid, flush=True)
time.sleep(600)
"""


def is_gone(pid: int, seconds: float) -> bool:
    ends_at_s = time.monotonic() + seconds
    while time.monotonic() < ends_at_s:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_worker_dies_with_its_parent(is_stopped: bool) -> None:
    """Also one that cannot notice the end of its socket."""
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if is_stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
        assert is_gone(pid, 3.0)


def test_a_worker_ends_at_the_end_of_its_socket_and_at_sigterm() -> None:
    for end in ("socket", "signal"):
        ours, theirs = socket.socketpair()
        with ours, subprocess.Popen([*worker_command(), str(theirs.fileno()), "test"], pass_fds=[theirs.fileno()]) as child:
            theirs.close()
            read_ready(ours)
            if end == "socket":
                ours.close()
            else:
                child.terminate()
            assert child.wait(5) == 0


def read_ready(ours: socket.socket) -> Ready:
    ours.settimeout(20)
    json_bytes, _ = frame_lengths(ours.recv(HEADER.size, socket.MSG_WAITALL))
    ready = decode_message(ours.recv(json_bytes, socket.MSG_WAITALL))
    assert isinstance(ready, Ready)
    return ready


def test_the_worker_needs_neither_the_working_directory_nor_a_path_nor_the_daemons_packages(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ""}
    with (
        ours,
        subprocess.Popen(
            [*worker_command(), str(theirs.fileno()), "test"], pass_fds=[theirs.fileno()], cwd=tmp_path, env=environment
        ) as child,
    ):
        theirs.close()
        assert read_ready(ours).pid == child.pid
        modules = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", "import sys; sys.path.insert(0, sys.argv[1]); import agent.worker.loop", ROOT],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
        ours.close()
        child.wait(5)
    for heavy in ("pydantic", "anyio", "cv2", "onnxruntime", "fastapi"):
        assert heavy not in modules


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.anyio
async def test_a_failed_spawn_leaves_no_descriptor_open() -> None:
    before = open_descriptors()
    for _ in range(3):
        with pytest.raises(OSError, match="No such file"):
            await spawn("none", ("/nowhere/python",))
    await until(lambda: open_descriptors() == before, 5)


def python38() -> str | None:
    """A Python 3.8 with numpy: JetPack 5's own, or what HOTSPARE_TEST_PYTHON38 names."""
    for candidate in (os.environ.get("HOTSPARE_TEST_PYTHON38"), shutil.which("python3.8")):
        if candidate and subprocess.run([candidate, "-c", "import numpy"], capture_output=True).returncode == 0:
            return candidate
    return None


@pytest.mark.anyio
async def test_the_worker_runs_under_python_38() -> None:
    python = python38()
    if python is None:
        pytest.skip("no Python 3.8 with numpy; name one in HOTSPARE_TEST_PYTHON38")
    worker = Worker("old", worker_command(python))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        running = await worker.until_running(30)
        assert isinstance(running, Running)
        assert running.python.startswith("3.8.")
        await worker.stop()
        assert worker.restarts == {}
