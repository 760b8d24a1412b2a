"""/v1/responses, whole and streamed: OpenAI's Responses API over the machinery of chats. Nothing is stored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from agent.http.chat import Turn, turn_of
from agent.http.collaborators import TextDelta, TokenLogprob, Usage
from agent.http.context import Context, add_post, now_s
from agent.http.errors import ApiError, fault_of
from agent.http.generation import Caller, chat_logprobs, follow
from agent.http.outcome import answered
from agent.http.reply import Said
from agent.http.response_events import ResponseEvents, identifier
from agent.http.response_request import NamedFunction, ResponseRequest, in_its_words
from agent.http.streams import WHOLE, Emit, EventForm, EventStream, json_bytes


def router(context: Context) -> APIRouter:
    routes = APIRouter()

    async def responses(body: ResponseRequest, request: Request) -> Response:
        """Answer a conversation with items."""
        caller = Caller(answered(request.scope))
        context.text().check_room(context.services.meant(body.model).model, caller.tenant, caller.priority)
        turn = await anyio.to_thread.run_sync(_turn, context, body, caller)
        events = ResponseEvents(_begun(body))
        if body.stream:
            form = EventForm(_written, lambda error: _written(events.failed(error)), b"")
            return EventStream(partial(_answer, context, turn, body, events), context.limits, context.metrics.disconnects.inc, form)

        async def nowhere(_: Any) -> None:
            """Whole answers are the last event's response."""

        async def whole(emit: Emit) -> None:
            await _answer(context, turn, body, events, nowhere)
            await emit(events.response)

        return EventStream(whole, context.limits, context.metrics.disconnects.inc, WHOLE)

    add_post(routes, "/responses", responses)
    return routes


def _turn(context: Context, body: ResponseRequest, caller: Caller) -> Turn:
    """Raises AgentError, ApiError."""
    try:
        return turn_of(context.text(), body.as_chat(), context.services.meant(body.model), caller)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]
        raise in_its_words(fault_of(faults, {"messages": []})) from error
    except ApiError as error:
        raise in_its_words(error) from error


async def _answer(context: Context, turn: Turn, body: ResponseRequest, events: ResponseEvents, emit: Emit) -> None:
    """Nothing is told before the model's first word, so that what fails until then has a status of its own."""
    (job,) = turn.jobs
    reply, is_begun, is_cut = turn.reply(), False, False
    untold: list[TokenLogprob] = []

    async def tell(told: Sequence[dict[str, Any]]) -> None:
        for each in told:
            await emit(each)

    async def begin() -> None:
        nonlocal is_begun
        if not is_begun:
            is_begun = True
            await tell(events.begin())

    async def say(said: Sequence[Said]) -> None:
        for each in said:
            logprobs = chat_logprobs(untold)["content"] if body.wants_logprobs and each.kind == "content" else ()
            untold.clear()
            await tell(events.say(each, logprobs))

    async def each(delta: TextDelta) -> None:
        nonlocal is_cut
        await begin()
        is_cut = delta.finish == "length" or (is_cut and delta.finish is None)
        untold.extend(delta.logprobs)
        await say(reply.feed(delta.text))

    usage = await follow(context.text(), context.metrics, turn.model, job, each)
    await begin()
    await say(reply.end())
    await tell(events.end(is_cut, now_s()))
    thought = 0
    if events.thoughts:
        thought = len(await anyio.to_thread.run_sync(context.text().encode, turn.model, events.thoughts))
    await tell([events.finished(_usage(usage, thought))])


def _begun(body: ResponseRequest) -> dict[str, Any]:
    """The response before its first item; what the request left out is told as it is understood."""
    choice = body.tool_choice
    format_ = body.text.format.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True) if body.text and body.text.format else {}
    return {
        "id": identifier("resp"),
        "object": "response",
        "created_at": now_s(),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": body.reasoning.model_dump() if body.reasoning else {"effort": None, "summary": None},
        "store": False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text", **format_}},
        "tool_choice": choice.model_dump() if isinstance(choice, NamedFunction) else choice or "auto",
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _usage(usage: Usage, thought: int) -> dict[str, Any]:
    """`thought`: tokens of what the model thought, counted anew from its text."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": min(thought, usage.completion_tokens)},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _written(event: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), json_bytes(event))
