"""/v1/rerank: documents by how near they are to a query, in the form that Cohere and Jina gave it."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.responses import Response

from agent.http.context import Context, add_post, new_id
from agent.http.outcome import answered
from agent.http.requests import Body, ModelName, Text
from agent.http.streams import unless_left

MAX_DOCUMENTS = 256


class Document(Body):
    text: Text


class RerankRequest(Body):
    model: ModelName | None = None
    query: Annotated[Text, Field(min_length=1)]
    documents: Annotated[list[Text | Document], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None


def router(context: Context) -> APIRouter:
    routes = APIRouter()

    async def rerank(body: RerankRequest, request: Request) -> Response:
        """The relevance is the cosine of an embedding model's vectors, from -1 to 1."""
        model = context.model_or_default(body.model, "embedding")
        texts = [document if isinstance(document, str) else document.text for document in body.documents]
        rows, tokens = await unless_left(request, lambda: context.text().embed(model, [body.query, *texts]), context.limits.answer_s)
        lengths = np.maximum(np.linalg.norm(rows, axis=1), 1e-12)
        scores = rows[1:] @ rows[0] / (lengths[1:] * lengths[0])
        context.metrics.tokens.labels(model, "prompt").inc(tokens)
        answered(request.scope).tokens += tokens

        def entry(index: int) -> dict[str, Any]:
            told = {"document": {"text": texts[index]}} if body.return_documents else {}
            return {"index": index, "relevance_score": round(float(scores[index]), 6), **told}

        order = np.argsort(-scores, kind="stable")[: body.top_n]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"id": new_id("rerank"), "model": model, "results": [entry(int(index)) for index in order], "usage": usage})

    add_post(routes, "/rerank", rerank)
    return routes
