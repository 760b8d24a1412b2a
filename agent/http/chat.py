"""/v1/chat/completions, whole and streamed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from agent.http.collaborators import TextDelta, Usage
from agent.http.context import Context, add_post, new_id, now_s
from agent.http.generation import Choice, Job, chat_logprobs, complete, follow, jobs_of, sampling_of, usage_of
from agent.http.requests import ChatRequest
from agent.http.streams import Emit, EventStream, all_of, unless_left


def router(context: Context) -> APIRouter:
    routes = APIRouter()

    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        text = context.text()
        # In a thread: megabytes take seconds, in which the node must go on answering and renewing its lease.
        prompt = await anyio.to_thread.run_sync(text.chat_prompt, body.model, [message.plain() for message in body.messages])
        jobs = jobs_of([prompt], body.n or 1, sampling_of(body, body.limit, body.wanted_logprobs))
        if body.stream:
            return EventStream(partial(_stream, context, body, jobs), context.limits, context.metrics.disconnects.inc)
        calls = [partial(complete, text, context.metrics, body.model, job) for job in jobs]
        choices = await unless_left(request, lambda: all_of(*calls), context.limits.answer_s)
        return JSONResponse(_answer(body, choices))

    add_post(routes, "/chat/completions", chat)
    return routes


def _answer(body: ChatRequest, choices: Sequence[Choice]) -> dict[str, Any]:
    return {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": now_s(),
        "model": body.model,
        "choices": [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": chat_logprobs(choice.logprobs) if body.logprobs else None,
                "finish_reason": choice.finish,
            }
            for choice in choices
        ],
        "usage": usage_of([choice.usage for choice in choices], prompts=1),
    }


async def _stream(context: Context, body: ChatRequest, jobs: Sequence[Job], emit: Emit) -> None:
    """For each choice a chunk with the role, chunks with text, one with the reason of its end; last, if wanted, the usage."""
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)
    head = {"id": new_id("chatcmpl"), "object": "chat.completion.chunk", "created": now_s(), "model": body.model}
    tail: dict[str, Any] = {"usage": None} if wants_usage else {}

    async def send(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None) -> None:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        await emit({**head, "choices": [choice], **tail})

    async def run(job: Job) -> Usage:
        has_role, finish = False, "stop"

        async def each(delta: TextDelta) -> None:
            nonlocal has_role, finish
            if not has_role:
                await send(job.index, {"role": "assistant", "content": ""})
                has_role = True
            finish = delta.finish or finish
            if delta.text or (delta.logprobs and body.logprobs):
                logprobs = chat_logprobs(delta.logprobs) if body.logprobs else None
                await send(job.index, {"content": delta.text}, logprobs)

        usage = await follow(context.text(), context.metrics, body.model, job, each)
        await send(job.index, {}, finish=finish)
        return usage

    usages = await all_of(*(partial(run, job) for job in jobs))
    if wants_usage:
        await emit({**head, "choices": [], "usage": usage_of(usages, prompts=1)})
