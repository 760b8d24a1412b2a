"""/v1/chat/completions, whole and streamed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from agent.http.collaborators import Meant, TextDelta, TextService, TokenLogprob, Usage
from agent.http.context import Context, add_post, new_id, now_s
from agent.http.errors import unsupported
from agent.http.generation import Caller, Choice, Job, chat_logprobs, complete_all, follow, jobs_of, sampling_of, usage_of
from agent.http.outcome import answered
from agent.http.reply import Call, Reply, Said
from agent.http.requests import ChatRequest
from agent.http.streams import WHOLE, Emit, EventStream, all_of


@dataclass(frozen=True)
class Turn:
    """What is to be generated for a request, and how its text is read."""

    model: str
    jobs: Sequence[Job]
    tools: Collection[str]
    is_thinking: bool

    def reply(self) -> Reply:
        return Reply(self.tools, self.is_thinking)


def router(context: Context) -> APIRouter:
    routes = APIRouter()

    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        text = context.text()
        meant, caller = context.services.meant(body.model), Caller(answered(request.scope))
        text.check_room(meant.model, caller.tenant, caller.priority)
        # In a thread: megabytes take seconds, in which the node must go on answering and renewing its lease.
        turn = await anyio.to_thread.run_sync(turn_of, text, body, meant, caller)
        if body.stream:
            return EventStream(partial(_stream, context, body, turn), context.limits, context.metrics.disconnects.inc)

        async def whole(emit: Emit) -> None:
            await emit(_answer(body, turn, await complete_all(text, context.metrics, turn.model, turn.jobs)))

        return EventStream(whole, context.limits, context.metrics.disconnects.inc, WHOLE)

    add_post(routes, "/chat/completions", chat)
    return routes


def turn_of(text: TextService, body: ChatRequest, meant: Meant, caller: Caller) -> Turn:
    """`meant`: what the name of the model stands for. Raises AgentError, ApiError."""
    model = meant.model
    sampling = sampling_of(body, body.limit, caller, body.wanted_logprobs, body.grammar(), meant.adapter)
    thinking = meant.thinking if body.thinking is None else body.thinking.type == "enabled"
    messages = [message.plain() for message in body.messages]
    if body.messages[-1].prefix:
        if sampling.grammar:
            raise unsupported("prefix", "an answer that has begun is held to no format here and calls no tools; leave them out")
        prompt, said = text.continued_prompt(model, messages[:-1], messages[-1]["content"])
        return Turn(model, jobs_of([prompt], body.n or 1, sampling, caller, continues=said > 0), (), False)
    tools = body.wanted_tools()
    offered = [tool.offered() for tool in body.tools or () if tool.function.name in tools]
    prompt = text.chat_prompt(model, messages, offered, thinking)
    return Turn(model, jobs_of([prompt], body.n or 1, sampling, caller), tools, text.begins_in_thoughts(model, thinking))


def _answer(body: ChatRequest, turn: Turn, choices: Sequence[Choice]) -> dict[str, Any]:
    return {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": now_s(),
        "model": body.model,
        "choices": [_choice(body, turn.reply(), choice) for choice in choices],
        "usage": usage_of([choice.usage for choice in choices], prompts=1),
    }


def _choice(body: ChatRequest, reply: Reply, choice: Choice) -> dict[str, Any]:
    said = [*reply.feed(choice.text), *reply.end()]
    content, thoughts = ("".join(each.text for each in said if each.kind == kind) for kind in ("content", "reasoning"))
    calls = [_call(each.call) for each in said if each.call]
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    return {
        "index": choice.index,
        "message": message,
        "logprobs": chat_logprobs(choice.logprobs) if body.logprobs else None,
        "finish_reason": finish_of(choice.finish, reply),
    }


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def finish_of(finish: str, reply: Reply) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "tool_calls" if finish == "stop" and reply.has_calls else finish


async def _stream(context: Context, body: ChatRequest, turn: Turn, emit: Emit) -> None:
    """For each choice a chunk with the role, chunks with what it says, one with the reason of its end; last, if wanted, the usage."""
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)
    head = {"id": new_id("chatcmpl"), "object": "chat.completion.chunk", "created": now_s(), "model": body.model}
    tail: dict[str, Any] = {"usage": None} if wants_usage else {}

    async def send(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None) -> None:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        await emit({**head, "choices": [choice], **tail})

    async def run(job: Job) -> Usage:
        reply, has_role, finish = turn.reply(), False, "stop"
        untold: list[TokenLogprob] = []

        async def say(said: Sequence[Said]) -> None:
            for each in said:
                logprobs = chat_logprobs(untold) if body.logprobs else None
                untold.clear()
                await send(job.index, delta_of(each), logprobs)

        async def each(delta: TextDelta) -> None:
            nonlocal has_role, finish
            if not has_role:
                await send(job.index, {"role": "assistant", "content": ""})
                has_role = True
            finish = delta.finish or finish
            untold.extend(delta.logprobs)
            await say(reply.feed(delta.text))

        usage = await follow(context.text(), context.metrics, turn.model, job, each)
        rest = reply.end()
        await say(rest if rest or not (untold and body.logprobs) else [Said("content")])
        await send(job.index, {}, finish=finish_of(finish, reply))
        return usage

    usages = await all_of(*(partial(run, job) for job in turn.jobs))
    if wants_usage:
        await emit({**head, "choices": [], "usage": usage_of(usages, prompts=1)})


def delta_of(said: Said) -> dict[str, Any]:
    """A piece of an answer as a chunk tells it."""
    if said.call is not None:
        return {"tool_calls": [{"index": said.call.index, **_call(said.call)}]}
    return {"reasoning_content" if said.kind == "reasoning" else "content": said.text}
