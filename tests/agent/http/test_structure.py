"""Tools and formats: what reaches the model, and what comes of its words."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from llguidance import LLMatcher

from agent.http.collaborators import Meant
from agent.http.grammars import of_choice, of_regex, of_schema, of_tools
from tests.agent.http.conftest import House

pytestmark = pytest.mark.anyio

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop"}},
]
CALL = '<tool_call>{"name":"weather","arguments":{"city":"Oslo"}}</tool_call>'


def ask(content: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "parrot", "messages": [{"role": "user", "content": content}], **more}


@pytest.mark.parametrize("is_forced", [False, True])
@pytest.mark.parametrize("is_single", [False, True])
def test_grammars_are_good_ones(is_forced: bool, is_single: bool) -> None:
    tools = {"weather": WEATHER, "stop": {}}
    for grammar in (
        of_tools(tools, is_forced, is_single),
        of_schema(WEATHER, "p"),
        of_choice(["yes", 'no"'], "p"),
        of_regex("[0-9]+", "p"),
    ):
        assert LLMatcher.validate_grammar(grammar) == ""


async def test_a_call_is_told_as_one(client: httpx.AsyncClient, house: House) -> None:
    answer = await client.post("/v1/chat/completions", json=ask(f"Looking. {CALL}", tools=TOOLS))
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Looking. "
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert [tool["function"]["name"] for tool in house.text.told["tools"]] == ["weather", "stop"]
    assert house.text.last
    assert "call_1" in house.text.last.grammar


async def test_a_call_is_streamed_as_one(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=ask(CALL, tools=TOOLS, stream=True))
    assert '"tool_calls":[{"index":0,"id":"call_' in answer.text
    assert '"finish_reason":"tool_calls"' in answer.text
    assert "<tool_call>" not in answer.text


async def test_named_and_forbidden_tools(client: httpx.AsyncClient, house: House) -> None:
    await client.post("/v1/chat/completions", json=ask(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "stop"}}))
    assert [tool["function"]["name"] for tool in house.text.told["tools"]] == ["stop"]
    answer = await client.post("/v1/chat/completions", json=ask(CALL, tools=TOOLS, tool_choice="none"))
    assert house.text.told["tools"] == []
    assert answer.json()["choices"][0]["message"]["content"] == CALL
    answer = await client.post("/v1/chat/completions", json=ask(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "fly"}}))
    assert answer.json()["error"]["param"] == "tool_choice"
    answer = await client.post("/v1/chat/completions", json=ask(tools=TOOLS, response_format={"type": "json_object"}))
    assert answer.json()["error"]["param"] == "response_format"


async def test_results_of_calls_reach_the_model(client: httpx.AsyncClient, house: House) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    said = [
        {"role": "user", "content": "Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    answer = await client.post("/v1/chat/completions", json={"model": "parrot", "messages": said, "tools": TOOLS})
    assert answer.status_code == 200
    _, called, result = house.text.told["messages"]
    assert called["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert result == {"role": "tool", "content": "rain", "tool_call_id": "call_1"}


async def test_formats_become_grammars(client: httpx.AsyncClient, house: House) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": WEATHER}}
    for more in ({"response_format": schema}, {"structured_outputs": {"json": WEATHER}}):
        assert (await client.post("/v1/chat/completions", json=ask(**more))).status_code == 200
        assert house.text.last
        assert '"city"' in house.text.last.grammar
    await client.post("/v1/completions", json={"model": "parrot", "prompt": "hi", "structured_outputs": {"choice": ["a", "b"]}})
    assert house.text.last
    assert house.text.last.grammar == 'start: "a" | "b"'


async def test_thoughts_are_apart(client: httpx.AsyncClient, house: House) -> None:
    answer = await client.post("/v1/chat/completions", json=ask("<think>hm</think> yes", thinking={"type": "enabled"}))
    message = answer.json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "yes")
    assert house.text.told["thinking"] is True
    house.text.thinks = True
    answer = await client.post("/v1/chat/completions", json=ask("still</think> yes", stream=True))
    assert '"reasoning_content":"still"' in answer.text


async def test_a_begun_answer_is_gone_on_with(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once upon", "prefix": True}]
    answer = await client.post("/beta/chat/completions", json={"model": "parrot", "messages": messages})
    assert answer.json()["choices"][0]["message"]["content"] == "Once upon"
    answer = await client.post("/beta/chat/completions", json={"model": "parrot", "messages": messages[::-1]})
    assert answer.json()["error"]["param"] == "messages"
    for more in ({"tools": TOOLS}, {"response_format": {"type": "json_object"}}, {"structured_outputs": {"regex": "a+"}}):
        answer = await client.post("/beta/chat/completions", json={"model": "parrot", "messages": messages, **more})
        assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == ("prefix", "unsupported_parameter")
    answer = await client.post(
        "/beta/chat/completions", json={"model": "parrot", "messages": messages, "tools": TOOLS, "tool_choice": "none"}
    )
    assert answer.status_code == 200


async def test_an_adapter_is_part_of_the_models_name(client: httpx.AsyncClient, house: House) -> None:
    answer = await client.post("/v1/chat/completions", json=ask() | {"model": "parrot:law"})
    assert answer.json()["model"] == "parrot:law"
    assert house.text.last
    assert house.text.last.adapter == "law"
    assert house.text.last.tenant == "127.0.0.1"


async def test_an_alias_may_choose_adapter_and_thinking(client: httpx.AsyncClient, house: House) -> None:
    house.meant = lambda name: Meant("parrot", "law", thinking=name.endswith("reasoner"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(house.app().asgi), base_url="http://node") as client:
        for name, more, thinking in (
            ("deepseek-reasoner", {}, True),
            ("deepseek-chat", {}, False),
            ("deepseek-chat", {"thinking": {"type": "enabled"}}, True),
            ("deepseek-reasoner", {"thinking": {"type": "disabled"}}, False),
        ):
            answer = await client.post("/v1/chat/completions", json=ask() | {"model": name} | more)
            assert answer.json()["model"] == name
            assert house.text.told["thinking"] is thinking
            assert house.text.last
            assert house.text.last.adapter == "law"
        item = {"messages": [{"role": "user", "content": "hi"}]}
        answer = await client.post("/v1/batch", json={"model": "deepseek-reasoner", "requests": [item]})
        assert answer.json()["results"][0]["text"] == "hi"
        assert house.text.told["thinking"] is True


async def test_the_paths_of_deepseek_answer(client: httpx.AsyncClient) -> None:
    for path in ("/models", "/v1/models", "/beta/models"):
        assert (await client.get(path)).json()["object"] == "list"
        assert (await client.get(f"{path}/deepseek-chat")).json()["id"] == "deepseek-chat"
    balance = (await client.get("/user/balance")).json()
    assert balance["is_available"] is True
    assert set(balance["balance_infos"][0]) == {"currency", "total_balance", "granted_balance", "topped_up_balance"}


async def test_documents_are_ranked_by_an_embedding_model(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        "/v1/rerank", json={"query": "abc", "documents": ["x" * 40, {"text": "abd"}], "top_n": 1, "return_documents": True}
    )
    (found,) = answer.json()["results"]
    assert (found["index"], found["document"]) == (1, {"text": "abd"})
    assert found["relevance_score"] == 1.0
    answer = await client.post("/v1/rerank", json={"query": "abc", "documents": []})
    assert answer.json()["error"]["param"] == "documents"
