"""A batch that could fill every slot, and a chat that cannot wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.stories.house import CHAT, QUESTION, House

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

NEVER_ENDING = {"0": -100, "2": -100}  # the marks that end an answer of this model
ITEM = {"prompt": "Once upon a time", "max_tokens": 100, "temperature": 1.0, "logit_bias": NEVER_ENDING}


async def test_a_chat_gets_its_first_token_while_a_batch_runs(tmp_path: Path) -> None:
    house, batches = House(tmp_path), list[dict[str, Any]]()
    async with house.node(house.node_settings("edge-a", worker={"slots": 2, "threads": 2, "context_tokens": 1024})) as node:
        await node.until_serving(CHAT)

        async def batch() -> None:
            requests = [{**ITEM, "seed": seed} for seed in range(2)]
            answer = await node.client.post("/v1/batch", json={"model": CHAT, "requests": requests}, timeout=240.0)
            batches.append(answer.json())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(batch)
            await anyio.sleep(1.0)
            async with node.client.stream("POST", "/v1/chat/completions", json={**QUESTION, "stream": True}, timeout=240.0) as answer:
                lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
            assert lines[-1] == "data: [DONE]"
            assert not batches, "the whole chat was answered beside a batch that wants every slot for itself"
        (done,) = batches
        assert [item["finish_reason"] for item in done["results"]] == ["length", "length"]
