"""A node as gateway in front of a cloud API that dies in mid-sentence: the real model finishes what the cloud began."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.agent.gateway.primaries import WORDS, FakePrimary, close, cut_at, stream_bytes
from tests.stories.house import CHAT, House, Node

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]
ASKED = {
    "model": "deepseek-chat",
    "temperature": 0,
    "max_tokens": 24,
    "stream": True,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
}


async def streamed(node: Node) -> tuple[str, str, list[dict[str, Any]]]:
    """(text, header, chunks); the stream must end with [DONE]."""
    answer = await node.client.post("/v1/chat/completions", json=ASKED)
    assert answer.status_code == 200, answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    return text, answer.headers["x-hotspare-backend"], chunks


async def test_the_real_model_finishes_what_the_cloud_began(tmp_path: Path) -> None:
    house, cloud = House(tmp_path), FakePrimary()
    async with cloud.running():
        settings = house.node_settings(
            "edge-a",
            models={"aliases": {"deepseek-chat": CHAT}},
            gateway={"primary": cloud.url, "probe_s": 30.0, "probe_timeout_s": 2.0},
        )
        async with house.node(settings) as node:
            await node.until_serving(CHAT)
            assert (await streamed(node))[:2] == ("".join(WORDS), "primary")
            cloud.behave = cut_at(len(b"".join(stream_bytes(model="deepseek-chat")[:6])) + 30)
            text, backend, chunks = await streamed(node)
            assert backend == "primary", "the head was sent before"
            assert text.startswith("The capital of France is Paris"), text
            assert len({chunk["id"] for chunk in chunks}) == 1
            assert chunks[-1]["hotspare"]["backend"] == "continued"
            cloud.behave = cloud.probed = close
            for _ in range(4):
                text, backend, _ = await streamed(node)
                assert backend == "local"
                assert "Paris" in text
            state = await node.state()
            assert any("requests are answered here" in event["message"] for event in state["events"])
