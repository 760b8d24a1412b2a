"""/v1/chat/completions on the wire: events byte by byte, DeepSeek's forms, refusals by name."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from agent.errors import WorkerRefused
from tests.agent.http.conftest import House

pytestmark = pytest.mark.anyio


def ask(content: Any = "hi there", **more: Any) -> dict[str, Any]:
    return {"model": "parrot", "messages": [{"role": "user", "content": content}], **more}


async def test_the_events_are_those_of_openai(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=ask("a b", stream=True, n=2))
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [choice["delta"] for choice in mine] == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": " b"}, {}]
        assert [choice["finish_reason"] for choice in mine] == [None, None, None, "stop"]
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions", "/beta/chat/completions"])
async def test_deepseek_forms_are_taken(client: httpx.AsyncClient, path: str) -> None:
    body = ask(
        thinking={"type": "enabled"}, reasoning_effort="high", user_id="u1", tools=None, response_format={"type": "text"},
        tool_choice="none", logit_bias={},
    )  # fmt: skip
    body["messages"].insert(0, {"role": "assistant", "content": "x", "reasoning_content": "hm", "refusal": None})
    answer = await client.post(path, json=body | {"model": "deepseek-chat"})
    assert answer.status_code == 200
    assert answer.json()["model"] == "deepseek-chat"
    usage = answer.json()["usage"]
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
    assert answer.headers["X-Served-By"] == "hotspare/spare-1"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five"),
        ({"colour": "red"}, "colour"),
        ({"n": 5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
    ],
)
async def test_a_fault_is_named(client: httpx.AsyncClient, more: dict[str, Any], param: str) -> None:
    answer = await client.post("/v1/chat/completions", json=ask() | more)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) < 600


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"stop": ["a"] * 5}, "at most 4"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}, "parts of type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "this field is required"),
    ],
)
async def test_a_fault_is_told_by_the_form_that_was_meant(client: httpx.AsyncClient, more: dict[str, Any], words: str) -> None:
    answer = await client.post("/v1/chat/completions", json=ask() | more)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"model": "parrot", "messages": [{"role": "user", "content": "a\ud83d"}]}),
        ("completions", {"model": "parrot", "prompt": ["a", "\ud83d"]}),
        ("embeddings", {"model": "letters", "input": "\ud83d"}),
        ("classify", {"input": "\ud83d"}),
    ],
)
async def test_half_a_surrogate_pair_is_the_clients_fault(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    answer = await client.post(f"/v1/{path}", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "surrogate" in answer.json()["error"]["message"]


async def test_a_missing_field_is_named(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"
    assert answer.json()["error"]["code"] == "missing_required_parameter"


@pytest.mark.parametrize("body", [b"{", b"[1]", b'"x"', b"", b"\xff", b'{"a":' * 50_000])
async def test_what_is_no_json_object_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    answer = await client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["code"] == "invalid_json"


async def test_choices_with_a_seed_differ_from_one_another(client: httpx.AsyncClient, house: House) -> None:
    await client.post("/v1/chat/completions", json=ask(n=3, seed=10))
    assert house.text.last
    assert house.text.last.seed == 12
    await client.post("/v1/chat/completions", json=ask(seed=-1))
    assert house.text.last.seed == (1 << 63) - 1, "workers take no negative ones"
    await client.post("/v1/chat/completions", json=ask(n=2))
    assert house.text.last.seed is None


async def test_biases_reach_the_model(client: httpx.AsyncClient, house: House) -> None:
    answer = await client.post("/v1/chat/completions", json=ask(logit_bias={"5": 1, "7": -100}))
    assert answer.status_code == 200
    assert house.text.last
    assert house.text.last.logit_bias == ((5, 1.0), (7, -100.0))


async def test_a_full_queue_says_when_to_come_back(client: httpx.AsyncClient, house: House) -> None:
    house.text.failure = WorkerRefused("busy", "16 requests wait already; try again later", 6.2)
    answer = await client.post("/v1/chat/completions", json=ask())
    assert answer.status_code == 429
    assert answer.headers["Retry-After"] == "7"
