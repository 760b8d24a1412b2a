"""/v1/responses with the unmodified `openai` client, and on the wire."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseReasoningItem
from pydantic import BaseModel

from tests.agent.http.conftest import House

CALL = '<tool_call>{"name":"weather","arguments":{"city":"Oslo"}}</tool_call>'
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
WEATHER: Any = {"type": "function", "name": "weather", "description": "of a city", "parameters": SCHEMA, "strict": True}


class Place(BaseModel):
    city: str


@pytest.fixture
def api(house: House, serve: Callable[[House], str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=serve(house) + "/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_a_text_is_answered(api: openai.OpenAI, house: House) -> None:
    answer = api.responses.create(
        model="deepseek-chat", input="Paris it is", instructions="Be brief.", max_output_tokens=9, temperature=0.5, top_p=0.9,
        metadata={"a": "b"}, store=False, reasoning={"effort": "none"}, truncation="disabled", user="u",
    )  # fmt: skip
    assert (answer.output_text, answer.status, answer.model, answer.object) == ("Paris it is", "completed", "deepseek-chat", "response")
    (message,) = answer.output
    assert isinstance(message, ResponseOutputMessage)
    assert (message.role, message.status) == ("assistant", "completed")
    assert answer.usage
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (3, 3, 6)
    assert (answer.usage.input_tokens_details.cached_tokens, answer.usage.output_tokens_details.reasoning_tokens) == (1, 0)
    assert (answer.instructions, answer.metadata, answer.temperature) == ("Be brief.", {"a": "b"}, 0.5)
    assert [message["role"] for message in house.text.told["messages"]] == ["system", "user"]
    assert house.text.told["thinking"] is False
    assert house.text.last
    assert (house.text.last.max_tokens, house.text.last.temperature, house.text.last.top_p) == (9, 0.5, 0.9)


def test_the_events_of_a_stream_make_the_whole_answer(api: openai.OpenAI) -> None:
    with api.responses.stream(model="parrot", input="one two three") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "one two three"
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds[4:-4] == ["response.output_text.delta"] * 3
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    events = list(api.responses.create(model="parrot", input="one two three", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert isinstance(events[-1].response, Response)
    assert events[-1].response.usage
    assert events[-1].response.usage.output_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_cut_is_incomplete(api: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "parrot", "input": "a b c", "max_output_tokens": 2}
    if stream:
        *_, last = api.responses.create(**asked, stream=True)
        assert last.type == "response.incomplete"
        answer = last.response
    else:
        answer = api.responses.create(**asked)
    assert (answer.status, answer.output_text) == ("incomplete", "a b")
    assert answer.incomplete_details
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_a_tool_is_called_and_its_result_read(api: openai.OpenAI, house: House) -> None:
    answer = api.responses.create(model="parrot", input=f"Looking. {CALL}", tools=[WEATHER], tool_choice="auto", parallel_tool_calls=False)
    said, call = answer.output
    assert isinstance(said, ResponseOutputMessage)
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, json.loads(call.arguments), call.status) == ("weather", {"city": "Oslo"}, "completed")
    assert house.text.last
    assert "call_0" in house.text.last.grammar
    told: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Oslo?"}]},
        *answer.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    api.responses.create(model="parrot", input=told, tools=[WEATHER])
    asked, assistant, result = house.text.told["messages"]
    assert asked == {"role": "user", "content": "Oslo?"}
    assert assistant["content"] == "Looking. "
    assert assistant["tool_calls"] == [
        {"id": call.call_id, "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    ]
    assert result == {"role": "tool", "tool_call_id": call.call_id, "content": "rain"}
    with api.responses.stream(model="parrot", input=CALL, tools=[WEATHER], tool_choice={"type": "function", "name": "weather"}) as stream:
        kinds = [event.type for event in stream]
        (streamed,) = stream.get_final_response().output
    assert kinds[2:-1] == [
        "response.output_item.added", "response.function_call_arguments.delta", "response.function_call_arguments.done",
        "response.output_item.done",
    ]  # fmt: skip
    assert isinstance(streamed, ResponseFunctionToolCall)
    assert streamed.arguments == '{"city": "Oslo"}'


def test_a_schema_becomes_a_grammar_and_an_object(api: openai.OpenAI, house: House) -> None:
    parsed = api.responses.parse(model="parrot", input='{"city":"Oslo"}', text_format=Place)
    assert parsed.output_parsed == Place(city="Oslo")
    assert house.text.last
    assert '"city"' in house.text.last.grammar
    api.responses.create(model="parrot", input="{}", text={"format": {"type": "json_object"}})
    assert house.text.last.grammar
    api.responses.create(model="parrot", input="{}", text={"format": {"type": "text"}, "verbosity": "low"})
    assert house.text.last.grammar == ""


def test_thoughts_and_probabilities(api: openai.OpenAI, house: House) -> None:
    house.text.thinks = True
    answer = api.responses.create(
        model="parrot", input="hm</think> yes", include=["message.output_text.logprobs"], top_logprobs=2, reasoning={"effort": "low"}
    )
    thought, said = answer.output
    assert isinstance(thought, ResponseReasoningItem)
    assert [part.text for part in thought.content or ()] == ["hm"]
    assert isinstance(said, ResponseOutputMessage)
    assert answer.output_text == "yes"
    (part,) = said.content
    assert part.type == "output_text"
    assert part.logprobs
    assert [other.token for other in part.logprobs[-1].top_logprobs] == [" yes", "x"]
    assert answer.usage
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    kinds = [event.type for event in api.responses.create(model="parrot", input="hm</think> yes", stream=True)]
    assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"colour": "red"}, "colour", "unknown_parameter"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "unsupported_parameter"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input", "unsupported_parameter"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input[0].arguments", "missing_required_parameter"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]}, "input", "invalid_value"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "invalid_value"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "objekt"}}}}, "text.format", "invalid_value"),
    ],
)
@pytest.mark.anyio
async def test_a_fault_is_named(client: httpx.AsyncClient, more: dict[str, Any], param: str, code: str) -> None:
    answer = await client.post("/v1/responses", json={"model": "parrot", "input": "hi", **more})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
    assert "response_format" not in error["message"]


def test_failures_have_a_status_before_the_first_word_and_an_event_after_it(api: openai.OpenAI, house: House) -> None:
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as lost:
            api.responses.create(model="parrot", input="boom", stream=stream)
        assert lost.value.code == "worker_lost"
        with pytest.raises(openai.NotFoundError):
            api.responses.create(model="gpt-99", input="hi", stream=stream)
    events = list(api.responses.create(model="parrot", input="to fall over", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error
    assert "SIGKILL" in events[-1].response.error.message
    assert [event.delta for event in events if event.type == "response.output_text.delta"] == ["to", " fall"]
    for _ in range(500):
        if len(house.outcomes) == 5:
            break
        time.sleep(0.01)
    assert not house.outcomes[-1].is_good
