"""/v1/batch: many requests merged into one call, answered item by item in their order; one bad item fails alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.responses import Response

from agent.errors import AgentError
from agent.http.context import Context, add_post, new_id, now_s
from agent.http.errors import ApiError, failed, fault_of
from agent.http.generation import Caller, Job, complete, jobs_of, sampling_of, usage_of
from agent.http.outcome import answered
from agent.http.requests import BatchItem, BatchRequest
from agent.http.streams import all_of, unless_left


def router(context: Context) -> APIRouter:
    routes = APIRouter()

    async def batch(body: BatchRequest, request: Request) -> Response:
        """Run the items side by side, as many at a time as leave room for chats in the worker's queue."""
        model = context.model_or_default(body.model, "generation")
        note = answered(request.scope)
        note.can_wait = True
        caller = Caller(note)
        calls = [partial(_answer, context, caller, model, index, raw) for index, raw in enumerate(body.requests)]
        items = await unless_left(request, lambda: all_of(*calls), context.limits.answer_s)
        usages = [item["usage"] for item in items if "usage" in item]
        return JSONResponse({
            "id": new_id("batch"),
            "object": "batch.result",
            "created": now_s(),
            "model": model,
            "results": items,
            "usage": {name: sum(usage[name] for usage in usages) for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
        })  # fmt: skip

    add_post(routes, "/batch", batch)
    return routes


async def _answer(context: Context, caller: Caller, default_model: str, index: int, raw: Any) -> dict[str, Any]:
    try:
        item = BatchItem.model_validate(raw)
        model = item.model or default_model
        text = context.text()
        meant = context.services.meant(model)

        def job_of_item() -> Job:
            if item.messages:
                prompt = text.chat_prompt(meant.model, [message.plain() for message in item.messages], thinking=meant.thinking)
            else:
                prompt = text.encode(meant.model, item.prompt) if isinstance(item.prompt, str) else item.prompt or []
            sampling = sampling_of(item, item.max_tokens, caller, grammar=item.grammar(), adapter=meant.adapter)
            return jobs_of([prompt], 1, sampling, caller)[0]

        job = await anyio.to_thread.run_sync(job_of_item)
        async with context.places:
            choice = await complete(text, context.metrics, meant.model, job)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]
        return {"index": index, **fault_of(faults, raw).body()}
    except ApiError as error:
        return {"index": index, **error.body()}
    except AgentError as failure:
        return {"index": index, **failed(failure).body()}
    return {
        "index": index,
        "text": choice.text,
        "finish_reason": choice.finish,
        "usage": usage_of([choice.usage], prompts=1),
        "model": model,
    }
