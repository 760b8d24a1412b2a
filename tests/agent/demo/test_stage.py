"""`hotspare demo` where it cannot run: one line, nothing left behind. That it runs is told in tests/stories."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from agent.config import Alias, load_settings
from agent.demo.stage import NODE, to_toml
from models.durable import exclusive


def demo(state: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agent.cli", "demo", "--state", str(state)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    with exclusive(tmp_path / "demo.lock", 1.0, "the test"):
        ended = demo(tmp_path)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "--state" in ended.stderr


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = demo(tmp_path / "file" / "[demo]")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "file/[demo]" in ended.stderr


def test_a_node_that_does_not_start_ends_the_demo_with_its_reason(tmp_path: Path) -> None:
    ended = demo(tmp_path, HOTSPARE__WORKER__PYTHON="/nonexistent/python")
    assert ended.returncode == 1
    assert "node ended with status 78" in ended.stderr or "is not installed" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not [
        line for line in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines() if str(tmp_path) in line
    ]


def test_what_is_written_for_the_node_is_what_it_reads(tmp_path: Path) -> None:
    line = {"start": [0.5, 0.0], "end": [0.5, 1.0]}
    values: dict[str, Any] = {
        "node": {"id": NODE, "state": f'{tmp_path}/a "b" \\c ü'},
        "models": {"serve": [], "aliases": {"deepseek-chat": "smollm2-135m-instruct"}},
        "cameras": [{"id": "belt", "source": "conveyor:?seed=7", "model": "conveyor-detr", "line": line}],
    }
    file = tmp_path / "node.toml"
    file.write_text(to_toml(values))
    settings = load_settings(file)
    assert str(settings.node.state) == values["node"]["state"]
    assert settings.models.aliases == {"deepseek-chat": Alias(model="smollm2-135m-instruct")}
    assert settings.cameras[0].pipeline()["line"] == line
