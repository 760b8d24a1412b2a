"""An operator says what a node is to have, sees it refused or applied, and restarts it: from the shell, through broker and coordinator."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import PIPE

import anyio
import pytest

from tests.conftest import ROOT
from tests.stories.house import House, needs_programs, until

pytestmark = [pytest.mark.anyio, needs_programs, pytest.mark.timeout(300)]

BELT = """\
models = ["conveyor-detr"]

[[pipelines]]
id = "belt"
source = "conveyor:?seed=3"
model = "conveyor-detr"
settings = { fps = 5.0 }
"""


async def fleet(house: House, *words: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "agent.cli", "fleet", "--coordinator", f"http://127.0.0.1:{house.coordinator}", *words]
    done = await anyio.run_process(command, check=False, stdout=PIPE, stderr=PIPE, cwd=ROOT)
    return done.returncode, done.stdout.decode() + done.stderr.decode()


async def test_a_document_is_applied_refused_and_outlives_a_restart_by_order(tmp_path: Path) -> None:
    house = House(tmp_path)
    good, bad = tmp_path / "belt.toml", tmp_path / "bad.toml"
    good.write_text(BELT)
    bad.write_text(BELT.replace("fps = 5.0", "fps = -5.0"))
    settings = house.node_settings("edge-a", mqtt={"host": "127.0.0.1", "port": house.broker}, models={"serve": []})
    supervised = {"HOTSPARE_SUPERVISED": "1"}
    async with house.mosquitto(), house.control("http://127.0.0.1:9") as coordinator:

        async def registered() -> bool:
            return (await coordinator.get("/fleet/edge-a")).is_success

        async with house.node(settings, supervised) as node:
            await until(registered, 30, "the node registers")
            status, words = await fleet(house, "apply", str(bad), "--all", "--deadline", "60")
            assert status == 1 and "edge-a: revision 1 is not taken" in words and "fps" in words, words
            status, words = await fleet(house, "apply", str(good), "edge-a", "--deadline", "120")
            assert status == 0 and "revision 2" in words and "applied by edge-a" in words, words
            assert [camera["id"] for camera in (await node.client.get("/cameras")).json()["data"]] == ["belt"]

            sent = (await coordinator.post("/fleet/edge-a/commands", json={"op": "agent.restart", "args": {"reason": "a test"}})).json()
            with anyio.fail_after(60):
                assert await node.process.wait() == 0

        async with house.node(settings, supervised) as node:

            async def ended() -> bool:
                return bool((await coordinator.get(f"/commands/{sent['id']}")).json()["status"] == "succeeded")

            await until(ended, 30, "the order ends with the node's next start")
            await node.until_serving("conveyor-detr")

        async with house.node(settings, {"NOTIFY_SOCKET": ""}) as node:  # nobody would start it again
            await until(registered, 30, "the node registers")
            status, words = await fleet(house, "send", "edge-a", "agent.restart")
            assert status == 1 and "HOTSPARE_SUPERVISED" in words, words
            assert node.process.returncode is None
