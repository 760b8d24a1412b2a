"""/v1/completions: text in, its continuation out; several prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from agent.http.collaborators import TextDelta, Usage
from agent.http.context import Context, add_post, new_id, now_s
from agent.http.generation import Caller, Choice, Job, complete_all, completion_logprobs, follow, jobs_of, sampling_of, usage_of
from agent.http.outcome import answered
from agent.http.requests import CompletionRequest
from agent.http.streams import WHOLE, Emit, EventStream, all_of

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def router(context: Context) -> APIRouter:
    routes = APIRouter()

    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        text = context.text()
        asked = body.prompts
        meant = context.services.meant(body.model)
        model = meant.model
        caller = Caller(answered(request.scope))
        text.check_room(model, caller.tenant, caller.priority)
        top_logprobs = -1 if body.logprobs is None else body.logprobs

        def jobs_of_body() -> list[Job]:
            prompts = [text.encode(model, prompt) if isinstance(prompt, str) else prompt for prompt in asked]
            max_tokens = body.max_tokens or DEFAULT_MAX_TOKENS
            sampling = sampling_of(body, max_tokens, caller, top_logprobs, body.grammar(), meant.adapter)
            return jobs_of(prompts, body.n or 1, sampling, caller)

        jobs = await anyio.to_thread.run_sync(jobs_of_body)
        if body.stream:
            return EventStream(partial(_stream, context, body, model, jobs, len(asked)), context.limits, context.metrics.disconnects.inc)

        async def whole(emit: Emit) -> None:
            await emit(_answer(body, await complete_all(text, context.metrics, model, jobs), len(asked)))

        return EventStream(whole, context.limits, context.metrics.disconnects.inc, WHOLE)

    add_post(routes, "/completions", completions)
    return routes


def _head(body: CompletionRequest) -> dict[str, Any]:
    return {"id": new_id("cmpl"), "object": "text_completion", "created": now_s(), "model": body.model}


def _answer(body: CompletionRequest, choices: Sequence[Choice], prompts: int) -> dict[str, Any]:
    wants_logprobs = body.logprobs is not None
    return {
        **_head(body),
        "choices": [
            {
                "index": choice.index,
                "text": choice.text,
                "logprobs": completion_logprobs(choice.logprobs, 0) if wants_logprobs else None,
                "finish_reason": choice.finish,
            }
            for choice in choices
        ],
        "usage": usage_of([choice.usage for choice in choices], prompts),
    }


async def _stream(context: Context, body: CompletionRequest, model: str, jobs: Sequence[Job], prompts: int, emit: Emit) -> None:
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)
    head = _head(body)
    tail: dict[str, Any] = {"usage": None} if wants_usage else {}

    async def run(job: Job) -> Usage:
        finish, offset = "stop", 0

        async def each(delta: TextDelta) -> None:
            nonlocal finish, offset
            finish = delta.finish or finish
            if delta.text or (delta.logprobs and body.logprobs is not None):
                logprobs = None if body.logprobs is None else completion_logprobs(delta.logprobs, offset)
                offset += len(delta.text)
                choice = {"index": job.index, "text": delta.text, "logprobs": logprobs, "finish_reason": None}
                await emit({**head, "choices": [choice], **tail})

        usage = await follow(context.text(), context.metrics, model, job, each)
        choice = {"index": job.index, "text": "", "logprobs": None, "finish_reason": finish}
        await emit({**head, "choices": [choice], **tail})
        return usage

    usages = await all_of(*(partial(run, job) for job in jobs))
    if wants_usage:
        await emit({**head, "choices": [], "usage": usage_of(usages, prompts)})
