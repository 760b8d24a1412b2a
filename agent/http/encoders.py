"""/v1/embeddings and /v1/classify: texts through an encoder."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from agent.http.context import Context, add_post
from agent.http.errors import unsupported
from agent.http.outcome import answered
from agent.http.requests import ClassifyRequest, EmbeddingRequest
from agent.http.streams import unless_left


def router(context: Context) -> APIRouter:
    routes = APIRouter()

    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """One vector for each input, as numbers or as base64 of little-endian float32."""
        call = partial(context.text().embed, body.model, body.inputs)
        rows, tokens = await unless_left(request, call, context.limits.answer_s)
        if body.dimensions not in (None, rows.shape[1]):
            raise unsupported("dimensions", f"{body.model} has {rows.shape[1]} dimensions and cannot be cut to {body.dimensions}")
        context.metrics.tokens.labels(body.model, "prompt").inc(tokens)
        answered(request.scope).tokens += tokens

        def written(row: Any) -> Any:
            return base64.b64encode(row.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else row.tolist()

        return JSONResponse({
            "object": "list",
            "data": [{"object": "embedding", "index": index, "embedding": written(row)} for index, row in enumerate(rows)],
            "model": body.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        })  # fmt: skip

    async def classify(body: ClassifyRequest, request: Request) -> Response:
        """The labels of each input with their probabilities, the likeliest first."""
        model = context.model_or_default(body.model, "classification")
        inputs = [body.input] if isinstance(body.input, str) else body.input
        results = await unless_left(request, partial(context.text().classify, model, inputs), context.limits.answer_s)
        return JSONResponse({
            "object": "list",
            "model": model,
            "data": [
                {
                    "object": "classification",
                    "index": index,
                    "label": scores[0][0],
                    "scores": [{"label": label, "score": score} for label, score in scores[: body.top or len(scores)]],
                }
                for index, scores in enumerate(results)
            ],
        })  # fmt: skip

    add_post(routes, "/embeddings", embeddings)
    add_post(routes, "/classify", classify)
    return routes
