"""Text floods a node with cameras: real workers for both, on the cores that are there. The cameras hold their floors, and recover."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.stories.house import CHAT, House, Node, until

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(300)]
FLOOR_FPS, FPS = 1.0, 5.0
CLIENTS, FLOOD_S = 8, 15.0
CAMERAS = [
    {"id": f"belt{number}", "source": f"conveyor:?seed={number}", "model": "conveyor-detr", "fps": FPS, "floor_fps": FLOOR_FPS}
    for number in range(2)
]


async def cameras(node: Node) -> dict[str, dict[str, Any]]:
    return {camera["id"]: camera for camera in (await node.client.get("/cameras")).json()["data"]}


async def looks(node: Node) -> dict[str, int]:
    return {name: camera["processed"] for name, camera in (await cameras(node)).items()}


async def ask_without_end(node: Node, number: int, ends: Counter[int]) -> None:
    while True:
        body = {"model": CHAT, "prompt": f"{number} {sum(ends.values())} Once upon a time", "max_tokens": 64, "temperature": 0.7}
        ends[(await node.client.post("/v1/completions", json=body)).status_code] += 1


async def test_cameras_keep_their_floor_while_text_floods_and_go_on_as_configured_after_it(tmp_path: Path) -> None:
    house, ends = House(tmp_path), Counter[int]()
    settings = house.node_settings("edge-a", worker={"threads": 1})
    settings["cameras"] = CAMERAS
    async with house.node(settings) as node:
        await node.until_serving(CHAT, "conveyor-detr")

        async def is_at(fps: float) -> bool:
            return all(camera["state"] == "streaming" and camera["fps_wanted"] == fps for camera in (await cameras(node)).values())

        async def gain(seconds: float) -> dict[str, float]:
            """Frames looked at per second."""
            before, began_s = await looks(node), time.monotonic()
            await anyio.sleep(seconds)
            after, passed_s = await looks(node), time.monotonic() - began_s
            return {name: (after[name] - before[name]) / passed_s for name in after}

        await until(lambda: is_at(FPS), 60.0, "both cameras go as configured")
        async with anyio.create_task_group() as tasks:
            for number in range(CLIENTS):
                tasks.start_soon(ask_without_end, node, number, ends)
            await until(lambda: is_at(FLOOR_FPS), 30.0, "both cameras are told to go at their floor")
            during = await gain(FLOOD_S)
            assert await is_at(FLOOR_FPS), "the flood was over too early"
            assert all(camera["is_slowed"] for camera in (await cameras(node)).values()), "they do not say that they are slowed"
            tasks.cancel_scope.cancel()
        # A status a second: what is read of a camera may be that much older than the clock.
        assert min(during.values()) >= FLOOR_FPS * (FLOOD_S - 2) / FLOOD_S, f"below the floor: {during}"
        assert max(during.values()) <= FLOOR_FPS * (FLOOD_S + 2) / FLOOD_S, f"they did not step back: {during}"
        assert ends[200] >= CLIENTS, f"text was not served: {ends}"
        await until(lambda: is_at(FPS), 30.0, "both cameras go as configured again")

        async def is_full() -> bool:
            return min((await gain(3.0)).values()) >= 0.8 * FPS

        await until(is_full, 60.0, "the cameras are looked at as often as before")
