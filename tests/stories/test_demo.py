"""`hotspare demo` as a person starts it: it says where to look, everything works, Ctrl-C leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import httpx
import pytest

from tests.stories.house import QUESTION, STORE, needs_programs, until

pytestmark = [pytest.mark.anyio, needs_programs, pytest.mark.timeout(400)]


def processes_of(folder: Path) -> list[str]:
    """Command lines of running processes that mention the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended while we looked
            continue
        if str(folder) in line:
            found.append(line)
    return found


async def test_the_demo_runs_and_ends_cleanly(tmp_path: Path) -> None:
    output = tmp_path / "output"
    state = tmp_path / "demo"
    environment = {**os.environ, "HOTSPARE__MODELS__STORE": str(STORE), "COLUMNS": "200"}
    with output.open("wb") as out:
        command = [sys.executable, "-m", "agent.cli", "demo", "--state", str(state)]
        demo = subprocess.Popen(command, stdout=out, stderr=out, env=environment)  # noqa: ASYNC220 - returns at once
    try:

        async def is_up() -> bool:
            assert demo.poll() is None, output.read_text()
            return "Ctrl-C ends all of it" in output.read_text()

        await until(is_up, 300, "the demo is up")
        said = output.read_text()
        assert str(state) in said
        node, front = (re.search(pattern, said) for pattern in (r"Open (http://\S+)/", r"curl -s (http://127\S+?)/v1/chat"))
        switch = re.search(r"'(http://\S+/switch)\?on=false'", said)
        assert node and front and switch, said
        async with httpx.AsyncClient(timeout=60.0, trust_env=False) as client:
            cloud = await client.post(f"{front[1]}/v1/chat/completions", json=QUESTION)
            assert cloud.headers["x-served-by"] == "cloud"
            await client.post(f"{switch[1]}?on=false")
            edge = await client.post(f"{front[1]}/v1/chat/completions", json=QUESTION)
            assert edge.headers["x-served-by"] == "hotspare/demo-node"
            assert "Paris" in edge.json()["choices"][0]["message"]["content"]

            async def counts() -> bool:
                counted: dict[str, int] = (await client.get(f"{node[1]}/node")).json()["pipelines"][0]["counts"]
                return sum(counted.values()) >= 2

            await until(counts, 30, "objects on the belt are counted")
            assert "<title>" in (await client.get(f"{node[1]}/")).text
        assert len(processes_of(state)) >= 4
        demo.send_signal(signal.SIGINT)
        assert await anyio.to_thread.run_sync(lambda: demo.wait(30)) == 0
        assert processes_of(state) == []
        assert "Traceback" not in output.read_text()
        assert "Traceback" not in (state / "log" / "node.log").read_text()
    finally:
        demo.kill()
        demo.wait()
