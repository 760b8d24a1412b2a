"""A batch that could fill every slot, and a chat that cannot wait; and one in a file, which outlives the node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import openai
import pytest

from tests.stories.house import CHAT, QUESTION, House, Node, until

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


def client_of(node: Node) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{node.client.base_url}/v1", api_key="none", max_retries=0, timeout=60.0)


async def test_a_file_of_requests_is_answered_through_the_kill_of_the_node_and_chats_come_first(tmp_path: Path) -> None:
    house = House(tmp_path)
    settings = house.node_settings("edge-a", worker={"slots": 2, "threads": 2, "context_tokens": 1024})
    body = {"model": CHAT, "messages": QUESTION["messages"], "logit_bias": NEVER_ENDING, "temperature": 1.0}
    requests = [
        {"custom_id": f"c{n}", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "max_tokens": 40, "seed": n}}
        for n in range(8)
    ]
    requests[5]["body"] = {**body, "temperature": 9}
    async with house.node(settings) as node, client_of(node) as client:
        await node.until_serving(CHAT)
        file = await client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, requests)).encode()), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        name = batch.id

        async def has_begun() -> bool:
            counts = (await client.batches.retrieve(name)).request_counts
            return counts is not None and counts.completed > 0

        await until(has_begun, 120.0, "the first line")
        question: Any = {**QUESTION, "max_tokens": 8}
        answer = await client.chat.completions.create(**question)
        assert answer.choices[0].message.content
        counts = (await client.batches.retrieve(name)).request_counts
        assert counts
        assert counts.completed < 7, "a chat was answered beside the batch"
        node.process.kill()
        await node.process.wait()
    async with house.node(settings) as node, client_of(node) as client:

        async def is_over() -> bool:
            return (await client.batches.retrieve(name)).status == "completed"

        await until(is_over, 180.0, "the end of the batch")
        batch = await client.batches.retrieve(name)
        assert batch.request_counts
        assert (batch.request_counts.completed, batch.request_counts.failed) == (7, 1)
        good = [json.loads(line) for line in (await client.files.content(str(batch.output_file_id))).text.splitlines()]
        bad = [json.loads(line) for line in (await client.files.content(str(batch.error_file_id))).text.splitlines()]
    assert sorted(one["custom_id"] for one in good) == ["c0", "c1", "c2", "c3", "c4", "c6", "c7"]
    assert {one["response"]["body"]["usage"]["completion_tokens"] for one in good} == {40}
    assert [(one["custom_id"], one["response"]["body"]["error"]["param"]) for one in bad] == [("c5", "temperature")]
