"""The unmodified openai client against a whole node on real weights."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import numpy as np
import openai
import pytest

from tests.stories.house import CHAT, House, Node

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]
QUESTION = "What is the capital of France? Answer in one sentence."


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def node(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Node]:
    """One for all stories here: none changes it, and it takes longer to start than most of them to be told."""
    house = House(tmp_path_factory.mktemp("house"))
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


async def test_responses_are_answered_whole_streamed_and_to_a_schema(node: Node) -> None:
    async with client_of(node) as client:
        whole = await client.responses.create(model=CHAT, input=QUESTION, temperature=0)
        assert "Paris" in whole.output_text
        stream = await client.responses.create(model=CHAT, input=QUESTION, temperature=0, stream=True)
        events = [event async for event in stream]
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
        assert events[-1].type == "response.completed"
        form: Any = {"format": {"type": "json_schema", "name": "person", "strict": True, "schema": PERSON}}
        person = await client.responses.create(model=CHAT, input="Make up a person.", text=form, max_output_tokens=60)
        assert set(json.loads(person.output_text)) == {"name", "age"}
        tool: Any = {"type": "function", "strict": True, **WEATHER["function"]}
        called = await client.responses.create(model=CHAT, input="What is the weather in Oslo?", tools=[tool], tool_choice="required")
        assert [item.name for item in called.output if item.type == "function_call"][:1] == ["weather"]


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


PERSON: Any = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]},
    },
}


async def test_answers_keep_to_a_schema_and_tools_are_called(node: Node, request: pytest.FixtureRequest) -> None:
    """60 answers at temperature 1, 200 with --run-slow; then a call, its result, and an answer to that."""
    faults: list[str] = []

    async def one(client: openai.AsyncOpenAI, seed: int) -> None:
        answer = await client.chat.completions.create(
            model=CHAT,
            temperature=1,
            seed=seed,
            max_tokens=60,
            messages=[{"role": "user", "content": "Make up a person."}],
            response_format={"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}},
        )
        try:
            person = json.loads(answer.choices[0].message.content or "")
            assert set(person) == {"name", "age"} and len(person["name"]) <= 12 and 0 <= person["age"] <= 120
        except (ValueError, AssertionError, TypeError, KeyError):
            faults.append(answer.choices[0].message.content or "")

    async with client_of(node) as client:
        limiter = anyio.CapacityLimiter(8)

        async def limited(seed: int) -> None:
            async with limiter:
                await one(client, seed)

        async with anyio.create_task_group() as tasks:
            for seed in range(200 if request.config.getoption("--run-slow") else 60):
                tasks.start_soon(limited, seed)
        assert faults == []

        messages: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
        asked = await client.chat.completions.create(model=CHAT, temperature=0, messages=messages, tools=[WEATHER], tool_choice="required")
        assert asked.choices[0].finish_reason == "tool_calls"
        (call,) = (asked.choices[0].message.tool_calls or [])[:1]
        assert call.type == "function"
        assert call.function.name == "weather"
        assert set(json.loads(call.function.arguments)) >= {"city"}
        messages += [asked.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "heavy snow, -7 degrees"}]
        told = await client.chat.completions.create(
            model=CHAT, temperature=0, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=60
        )
        assert told.choices[0].message.content
