"""The cloud fails, the edge answers the same call, the cloud comes back, the edge steps down."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from agent.demo.primary import SwitchablePrimary
from tests.stories.house import CHAT, QUESTION, House, needs_programs, until

pytestmark = [pytest.mark.anyio, needs_programs, pytest.mark.timeout(300)]
logger = logging.getLogger(__name__)


async def asked(client: httpx.AsyncClient) -> tuple[int, str, str]:
    """(status, who answered, the answer)"""
    answer = await client.post("/v1/chat/completions", json=QUESTION)
    body = answer.json()
    text = body["choices"][0]["message"]["content"] if answer.is_success else body.get("error", {}).get("message", "")
    return answer.status_code, answer.headers.get("x-served-by", ""), text


@pytest.mark.parametrize("contingent", [False, True], ids=["after three failed probes", "at once, by a contingent lease"])
async def test_the_node_takes_over_and_steps_down(tmp_path: Path, contingent: bool) -> None:
    house = House(tmp_path)
    async with anyio.create_task_group() as tasks:
        primary = SwitchablePrimary()
        tasks.start_soon(primary.run)
        settings = house.node_settings("edge-a", mqtt={"host": "127.0.0.1", "port": house.broker, "heartbeat_standby_s": 2.0})
        async with (
            house.mosquitto(),
            house.control(primary.url, contingent=contingent) as coordinator,
            house.node(settings) as node,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{house.front}", timeout=60.0, trust_env=False) as front,
        ):
            await node.until_serving(CHAT)
            state = await node.until_mode("standby")
            await until(lambda: in_nginx(tmp_path), 10, "the node is in nginx's upstream")
            if contingent:
                await until(lambda: leased(coordinator, "contingent"), 10, "a contingent lease")

            assert (await asked(front))[:2] == (200, "cloud")
            direct = await node.client.post("/v1/chat/completions", json=QUESTION)
            assert direct.status_code == (200 if contingent else 503)
            if not contingent:
                assert int(direct.headers["retry-after"]) > 0
                assert direct.headers["x-hotspare-mode"] == "standby"
                assert direct.json()["error"]["type"] == "server_error"

            await primary.switch(False)
            down_s = anyio.current_time()
            if contingent:
                status, by, text = await asked(front)
                assert (status, by) == (200, "hotspare/edge-a"), "no gap: the very first call is answered"
            else:
                status, by, text = await until(lambda: served(front), 15, "nginx answers again")
            assert "Paris" in text
            logger.warning("first answer of the edge %.2f s after the outage", anyio.current_time() - down_s)
            state = await node.until_mode("active")
            logger.warning("active %.2f s after the outage, epoch %d", anyio.current_time() - down_s, state["epoch"])

            await primary.switch(True)
            up_s = anyio.current_time()
            await node.until_mode("standby")
            logger.warning("standby %.2f s after the primary came back", anyio.current_time() - up_s)
            assert (await asked(front))[:2] == (200, "cloud"), "no gap on the way back either"
            modes = [event["message"] for event in (await node.state())["events"] if event["kind"] == "mode"]
            assert [mode.split(",")[0] for mode in modes][-3:] == ["active", "draining", "standby"]
        tasks.cancel_scope.cancel()


async def served(front: httpx.AsyncClient, by: str = "hotspare/edge-a") -> tuple[int, str, str] | None:
    answer = await front.post("/v1/chat/completions", json=QUESTION)
    if answer.status_code != 200 or answer.headers.get("x-served-by") != by:
        return None
    return 200, by, answer.json()["choices"][0]["message"]["content"]


async def in_nginx(folder: Path) -> bool:
    return "# edge-a" in await anyio.Path(folder / "nginx" / "hotspare.conf").read_text()


async def leased(coordinator: httpx.AsyncClient, kind: str) -> Any:
    return [node for node in (await coordinator.get("/fleet")).json()["nodes"] if node["lease"] == kind]
