"""The node as a process: what stops it from starting is one line and an exit status, never a traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from models.durable import exclusive


def started(state: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`hotspare run` that is expected to give up."""
    settings = {"HOTSPARE__NODE__STATE": str(state), "HOTSPARE__HTTP__PORT": "0", **environment}
    return subprocess.run(
        [sys.executable, "-m", "agent.cli", "run"], env={**os.environ, **settings}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("not hex", "sha256sum"),
        ("abcd", "64 hex digits"),
        (f"{64 * 'a'} rpm=3", "requests_per_minute=NUMBER"),
        ("", "has no key"),
        ("# none\n", "has no key"),
        (None, "No such file"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_a_configuration_error(tmp_path: Path, keys: str | None, said: str) -> None:
    file = tmp_path / "keys"
    if keys is not None:
        file.write_text(keys)
    ended = started(tmp_path / "state", HOTSPARE__HTTP__KEYS_FILE=str(file))
    assert ended.returncode == 78, "systemd must not try it again"
    assert ended.stderr.count("\n") == 1
    assert said in ended.stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = started(tmp_path, HOTSPARE__HTTP__PORT=port)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert port in ended.stderr


def test_two_nodes_do_not_share_a_state_folder(tmp_path: Path) -> None:
    with exclusive(tmp_path / "node.lock", 1.0, "the test"):
        ended = started(tmp_path)
    assert ended.returncode == 1
    assert "of which every node needs its own" in ended.stderr


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = started(tmp_path / "file" / "state")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "file/state" in ended.stderr
