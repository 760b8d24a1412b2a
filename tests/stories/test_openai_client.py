"""The unmodified openai client against a whole node on real weights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.stories.house import CHAT, House, Node

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]
QUESTION = "What is the capital of France? Answer in one sentence."


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    house = House(tmp_path)
    settings = house.node_settings("edge-a", models={"serve": [CHAT, "all-minilm-l6-v2"], "aliases": {"deepseek-chat": CHAT}})
    async with house.node(settings) as node:
        await node.until_serving(CHAT, "all-minilm-l6-v2")
        yield node


def client_of(node: Node) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{node.client.base_url}/v1", api_key="none", max_retries=0, timeout=60.0)


async def test_it_answers_as_the_cloud_would(node: Node) -> None:
    async with client_of(node) as client:
        assert {model.id async for model in client.models.list()} == {CHAT, "deepseek-chat", "all-minilm-l6-v2"}

        whole = await client.chat.completions.create(model="deepseek-chat", temperature=0, messages=[{"role": "user", "content": QUESTION}])
        assert "Paris" in (whole.choices[0].message.content or "")
        assert (whole.model, whole.choices[0].finish_reason) == ("deepseek-chat", "stop")
        assert whole.usage is not None
        assert whole.usage.completion_tokens > 3

        pieces, usage = [], None
        stream = await client.chat.completions.create(
            model=CHAT,
            temperature=0,
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            pieces += [choice.delta.content or "" for choice in chunk.choices]
            usage = chunk.usage or usage
        assert "".join(pieces) == whole.choices[0].message.content
        assert len([piece for piece in pieces if piece]) > 3, "it came in pieces"
        assert usage is not None
        assert usage.completion_tokens == whole.usage.completion_tokens

        plain = await client.completions.create(model=CHAT, prompt="The capital of France is", max_tokens=4, temperature=0)
        assert "Paris" in plain.choices[0].text

        vectors = await client.embeddings.create(model="all-minilm-l6-v2", input=["a cat", "a kitten", "income tax"])
        cat, kitten, tax = (np.array(item.embedding) for item in vectors.data)
        assert cat @ kitten > 0.7 > 0.3 > cat @ tax


async def test_its_errors_are_the_clients_own_exceptions(node: Node) -> None:
    async with client_of(node) as client:
        messages: Any = [{"role": "user", "content": "hi"}]
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.chat.completions.create(model=CHAT, messages=messages, temperature=-1)
        with pytest.raises(openai.NotFoundError, match="gpt-9"):
            await client.chat.completions.create(model="gpt-9", messages=messages)
        for words in (3000, 400_000):
            long: Any = [{"role": "user", "content": "word " * words}]
            with pytest.raises(openai.BadRequestError, match="token") as refused:
                await client.chat.completions.create(model=CHAT, messages=long)
            assert refused.value.code == "context_length_exceeded"


async def test_merged_requests_are_answered_in_order_each_by_itself(node: Node) -> None:
    requests = [
        {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0},
        {"prompt": "x", "max_tokens": -1},
        {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0},
    ]
    answer = (await node.client.post("/v1/batch", json={"model": CHAT, "requests": requests})).json()
    first, second, third = answer["results"]
    assert "Paris" in first["text"]
    assert second["error"]["param"].endswith("max_tokens")
    assert "Paris" in third["text"]
