"""A runtime is upgraded: what was built for the one before serves at once, its successor takes over, and no request is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import cv2
import httpx
import pytest

from converters.native_from_causal_model import find_compiler
from models.conveyor import Conveyor
from models.store import Store, open_store
from tests.conftest import ROOT
from tests.converters.tiny_gguf import Recipe, write_decoder
from tests.stories.house import House, Node, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


def converted(state: Path, *words: str) -> None:
    command = [sys.executable, "-m", "agent.cli", "convert", *words]
    subprocess.run(command, cwd=ROOT, env={"PATH": "/usr/bin:/bin", "HOTSPARE_STATE": str(state)}, check=True, capture_output=True)


def as_if_before_an_upgrade(store: Store, model: str) -> None:
    """The engine is what the runtime before would have left; that of the runtime of today is not there."""
    (engine,) = store.engines(model)
    with store.temporary() as folder:
        for name in engine.record.files:
            (folder / name).write_bytes(engine.path(name).read_bytes())
        store.publish_engine(replace(engine.record.key, runtime_version="1.0.0"), folder, engine.record.verdict, {})
    store.discard(engine.folder)


class Client:
    """Asks without a pause, and keeps every answer's status."""

    def __init__(self, ask: Callable[[], Awaitable[httpx.Response]]) -> None:
        self.answers: list[int] = []
        self._ask = ask

    async def run(self) -> None:
        while True:
            self.answers.append((await self._ask()).status_code)


async def engine_of(node: Node, model: str) -> dict[str, Any]:
    answer = await node.client.get(f"/v1/deployments/{model}")
    values: dict[str, Any] = answer.json()
    return values


async def test_an_upgrade_costs_no_request(tmp_path: Path) -> None:
    house, store = House(tmp_path), open_store(tmp_path / "store")
    converted(store.root, "conveyor-detr")
    converted(store.root, str(write_decoder(tmp_path / "tiny.gguf", Recipe())), "--target", "onnxruntime")
    as_if_before_an_upgrade(store, "conveyor-detr")
    settings = house.node_settings("edge-a", models={"store": str(store.root), "serve": ["tiny", "conveyor-detr"]})
    picture = cv2.imencode(".jpg", Conveyor(seed=1).frame(3.0))[1].tobytes()
    async with house.node(settings) as node:
        await node.until_serving("tiny", "conveyor-detr", deadline_s=30)
        seeing = Client(lambda: node.client.post("/v1/detect", files={"image": ("belt.jpg", picture, "image/jpeg")}))
        talking = Client(lambda: node.client.post("/v1/completions", json={"model": "tiny", "prompt": "hello world", "max_tokens": 60}))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(seeing.run)
            tasks.start_soon(talking.run)

            async def is_current() -> bool:
                return all([(await engine_of(node, model))["is_current"] for model in ("tiny", "conveyor-detr")])

            await until(is_current, 60, "both engines are those of today")
            seen = len(seeing.answers), len(talking.answers)

            async def goes_on() -> bool:
                return len(seeing.answers) > seen[0] + 3 and len(talking.answers) > seen[1] + 3

            await until(goes_on, 30, "both go on being asked")
            tasks.cancel_scope.cancel()
        state = await node.state()
        eyes, tiny = await engine_of(node, "conveyor-detr"), await engine_of(node, "tiny")
    assert set(seeing.answers) == {200}
    assert set(talking.answers) == {200}
    assert "1.0.0" not in eyes["engine"]
    assert tiny["engine"].startswith("native" if find_compiler() else "onnxruntime")
    assert any("conveyor-detr served by its new engine" in event["message"] for event in state["events"])
