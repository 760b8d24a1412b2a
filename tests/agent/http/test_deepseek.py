"""Exchanges in DeepSeek's form, as its documentation has them (https://api-docs.deepseek.com): a table of requests and what must come back.

The answers' ids, times and words are a node's own; the fields, their places and the statuses are DeepSeek's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from agent.errors import WorkerRefused
from agent.http.collaborators import Limits, Meant, ServiceFailure
from tests.agent.http.conftest import House

HI = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Hello!"}]
THOUGHT = [{"role": "user", "content": "hm</think> 9.8"}]
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "Hello!", "refusal": None}, "logprobs": None, "finish_reason": "stop"}
USAGE = {
    "prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1},
    "prompt_cache_hit_tokens": 1, "prompt_cache_miss_tokens": 0,
}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

# Under each name: path and body, then what the answer has.
WHOLE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "first API call, bare host": (
        "/chat/completions", {"model": "deepseek-chat", "messages": HI, "stream": False},
        {"object": "chat.completion", "model": "deepseek-chat", "choices": [CHOICE], "usage": USAGE},
    ),
    "with /v1": ("/v1/chat/completions", {"model": "deepseek-chat", "messages": HI}, {"model": "deepseek-chat", "choices": [CHOICE]}),
    "with /beta": ("/beta/chat/completions", {"model": "deepseek-chat", "messages": HI}, {"model": "deepseek-chat", "usage": USAGE}),
    "a name of today": (
        "/chat/completions", {"model": "deepseek-v4-pro", "messages": HI, "thinking": {"type": "disabled"}},
        {"model": "deepseek-v4-pro", "choices": [CHOICE]},
    ),
    "all fields of its reference": (
        "/chat/completions",
        {
            "model": "deepseek-v4-flash", "messages": HI, "frequency_penalty": 0, "max_tokens": 4096, "presence_penalty": 0,
            "response_format": {"type": "text"}, "stop": None, "stream": False, "stream_options": None, "temperature": 1, "top_p": 1,
            "tools": None, "tool_choice": "none", "logprobs": False, "top_logprobs": None, "thinking": {"type": "enabled"},
            "reasoning_effort": "high", "user_id": "u-1",
        },
        {"model": "deepseek-v4-flash", "choices": [CHOICE]},
    ),
    "thoughts": (
        "/chat/completions", {"model": "deepseek-reasoner", "messages": THOUGHT, "max_tokens": 64},
        {"choices": [{**CHOICE, "message": {"role": "assistant", "content": "9.8", "reasoning_content": "hm", "refusal": None}}]},
    ),
    "a second turn that sends its thoughts back": (
        "/chat/completions",
        {"model": "deepseek-reasoner", "messages": [*HI, {"role": "assistant", "content": "x", "reasoning_content": "hm"}, *THOUGHT]},
        {"choices": [{**CHOICE, "message": {"role": "assistant", "content": "9.8", "reasoning_content": "hm", "refusal": None}}]},
    ),
    "chat prefix completion": (
        "/beta/chat/completions",
        {"model": "deepseek-chat", "messages": [HI[1], {"role": "assistant", "content": "```python", "prefix": True}], "stop": ["```x"]},
        {"choices": [{**CHOICE, "message": {"role": "assistant", "content": "```python", "refusal": None}}]},
    ),
    "completion": (
        "/beta/completions", {"model": "deepseek-chat", "prompt": "def fib(a):", "max_tokens": 128},
        {"object": "text_completion", "choices": [{"index": 0, "text": "def fib(a):", "logprobs": None, "finish_reason": "stop"}]},
    ),
}  # fmt: skip

# Under each name: path, body or bytes, then the status and the code of the refusal.
FAULTS: dict[str, tuple[str, Any, int, str]] = {
    "no JSON": ("/chat/completions", b"{", 400, "invalid_json"),
    "no messages": ("/chat/completions", {"model": "deepseek-chat"}, 422, "missing_required_parameter"),
    "a parameter out of range": ("/chat/completions", {"model": "deepseek-chat", "messages": HI, "temperature": 3}, 422, "invalid_value"),
    "in its beta": ("/beta/completions", {"model": "deepseek-chat", "prompt": "a", "suffix": "b"}, 422, "unsupported_parameter"),
    "OpenAI's base": ("/v1/chat/completions", {"model": "deepseek-chat", "messages": HI, "temperature": 3}, 400, "invalid_value"),
    "an unknown model": ("/chat/completions", {"model": "deepseek-v9", "messages": HI}, 404, "model_not_found"),
}


@pytest.fixture
def url(house: House, serve: Callable[[House], str]) -> str:
    names = ("deepseek-chat", "deepseek-reasoner", "deepseek-v4-flash", "deepseek-v4-pro")
    house.meant = lambda name: Meant("parrot" if name in names else name, thinking=name == "deepseek-reasoner")
    return serve(house)


@pytest.fixture
def deepseek(url: str) -> Iterator[openai.OpenAI]:
    """The unmodified client with DeepSeek's base URL."""
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        yield client


@pytest.mark.parametrize("name", WHOLE)
def test_whole_answers(house: House, url: str, name: str) -> None:
    path, body, has = WHOLE[name]
    house.text.thinks = THOUGHT[0] in body.get("messages", ())
    answer = httpx.post(url + path, json=body)
    assert answer.status_code == 200, answer.text
    assert int(answer.headers["content-length"]) == len(answer.content)
    told = answer.json()
    assert {field: told[field] for field in has} == has
    usage = told["usage"]
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]


@pytest.mark.parametrize("name", FAULTS)
def test_faults(url: str, name: str) -> None:
    path, body, status, code = FAULTS[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    for stream in (b"", b'{"stream": true, '):
        if stream and isinstance(body, dict):
            content = stream + json.dumps(body).encode()[1:]
        answer = httpx.post(url + path, content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text


def test_a_stream_of_thoughts_and_words(house: House, deepseek: openai.OpenAI) -> None:
    house.text.thinks = True
    thoughts, words, usage = "", "", None
    messages: Any = THOUGHT
    stream = deepseek.chat.completions.create(
        model="deepseek-reasoner", messages=messages, stream=True, stream_options={"include_usage": True},
        extra_body={"thinking": {"type": "enabled"}},
    )  # fmt: skip
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thoughts += getattr(choice.delta, "reasoning_content", None) or ""
            words += choice.delta.content or ""
    assert (thoughts, words) == ("hm", "9.8")
    assert usage
    assert usage.model_dump()["prompt_cache_hit_tokens"] == 1


def test_while_a_request_waits_a_stream_has_comments_and_a_whole_answer_empty_lines(house: House, serve: Callable[[House], str]) -> None:
    house.limits = Limits(head_hold_s=0.05, keep_alive_s=0.05)
    house.text.before_s = 0.5
    url = serve(house)
    messages: Any = HI
    asked = {"model": "parrot", "messages": HI}
    streamed = httpx.post(f"{url}/chat/completions", json={**asked, "stream": True}).text
    assert streamed.startswith(": keep-alive\n\n: keep-alive\n\n")
    assert streamed.endswith("data: [DONE]\n\n")
    whole = httpx.post(f"{url}/chat/completions", json=asked)
    assert whole.text.startswith("\n\n")
    assert whole.json()["choices"] == [CHOICE]
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert client.chat.completions.create(model="parrot", messages=messages).choices[0].message.content == "Hello!"
        stream = client.chat.completions.create(model="parrot", messages=messages, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello!"
        house.text.late_failure = ServiceFailure("worker_lost", "worker text died: SIGKILL")
        with pytest.raises(openai.APIConnectionError):  # its head has said 200: whatever came now would be taken for an answer
            client.chat.completions.create(model="parrot", messages=messages)
    for _ in range(20):  # the outcome is told a moment after the end
        if len(house.outcomes) == 5:
            break
        httpx.get(f"{url}/healthz")
    assert not house.outcomes[-1].is_good


def test_errors_are_the_clients_own_exceptions(house: House, deepseek: openai.OpenAI) -> None:
    messages: Any = HI
    for stream in (False, True):
        house.text.failure = WorkerRefused("busy", "16 requests wait already", 6.2)
        with pytest.raises(openai.RateLimitError) as busy:
            deepseek.chat.completions.create(model="deepseek-chat", messages=messages, stream=stream)
        assert (busy.value.status_code, busy.value.code, busy.value.response.headers["retry-after"]) == (429, "busy", "7")
        house.text.failure = WorkerRefused("deadline", "the answer was not complete before its deadline")
        with pytest.raises(openai.InternalServerError) as late:
            deepseek.chat.completions.create(model="deepseek-chat", messages=messages, stream=stream)
        assert (late.value.status_code, late.value.code) == (504, "deadline")
        house.text.failure = None
        with pytest.raises(openai.UnprocessableEntityError):
            deepseek.chat.completions.create(model="deepseek-chat", messages=messages, stream=stream, top_p=0)


def test_a_client_says_how_long_it_waits(house: House, deepseek: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "wait"}]
    soon = {"X-Request-Timeout": "0.5"}
    with pytest.raises(openai.InternalServerError) as late:
        deepseek.chat.completions.create(model="deepseek-chat", messages=messages, extra_headers=soon)
    assert (late.value.status_code, late.value.code) == (504, "deadline")
    assert house.text.last
    assert 0 < house.text.last.deadline_s <= 0.5, "the worker is told too"
    with pytest.raises(openai.APIError, match="not complete in its time"):
        list(deepseek.chat.completions.create(model="deepseek-chat", messages=messages, extra_headers=soon, stream=True))
    for said in ("0", "-1", "soon", "1e9", "inf"):
        with pytest.raises(openai.UnprocessableEntityError, match="X-Request-Timeout"):
            deepseek.chat.completions.create(model="deepseek-chat", messages=messages, extra_headers={"X-Request-Timeout": said})
    quick: Any = HI
    deepseek.chat.completions.create(model="deepseek-chat", messages=quick, extra_headers={"X-Request-Timeout": "100000"})
    assert house.text.last.deadline_s == 600.0
