"""/v1/batches: files of requests that are answered when there is time, in OpenAI's form. A key sees its own only."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from agent.batches.record import WINDOW_S, Batch, Counts, Endpoint, told_to_stop
from agent.batches.store import BatchStore, NoRoom, new_id, no_room
from agent.http.context import Context, add_route
from agent.http.errors import ApiError, unsupported
from agent.http.files import HOUR_S, LONGEST_S, Cursor, busy, full, is_own, known, store_of
from agent.http.outcome import answered
from agent.http.paging import page
from agent.http.requests import Body

MOST_UNFINISHED = 64  # of all keys; the next is told to come back
MOST_OF_ONE = 16  # of one key, where there are keys

Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=HOUR_S, le=LONGEST_S)]


class BatchOrder(Body):
    input_file_id: Annotated[str, Field(min_length=1, max_length=80)]
    endpoint: Annotated[str, Field(max_length=80)]
    completion_window: Annotated[str, Field(max_length=80)]
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


def router(context: Context) -> APIRouter:
    routes = APIRouter()

    async def create(body: BatchOrder, request: Request) -> Response:
        """Answer the requests of a file within a day."""
        store = store_of(context)
        batch = _batch(store, body, request)
        owners = [one.owner for one in store.unfinished()]
        if len(owners) >= MOST_UNFINISHED:
            raise busy(f"{MOST_UNFINISHED} batches of this node are not over yet; wait for one of them, or cancel it")
        if batch.owner and owners.count(batch.owner) >= MOST_OF_ONE:
            raise busy(f"{MOST_OF_ONE} batches of this key are not over yet; wait for one of them, or cancel it")
        try:
            await store.add_batch(batch)
        except NoRoom as error:
            raise full(error) from error
        return JSONResponse(shown(store, batch))

    async def batches(request: Request, after: Cursor = None, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Response:
        """The newest first."""
        store = store_of(context)
        own = (batch for batch in store.batches.values() if is_own(request, batch.owner))
        return JSONResponse(page(own, partial(shown, store), after, limit))

    async def batch(identifier: str, request: Request) -> Response:
        store = store_of(context)
        return JSONResponse(shown(store, _known(store, identifier, request)))

    async def cancel(identifier: str, request: Request) -> Response:
        """What has its answer keeps it."""
        store = store_of(context)
        one = _known(store, identifier, request)
        try:
            after = await store.change(one.id, lambda batch: told_to_stop(batch, int(store.clock())))
        except OSError as error:
            raise full(no_room(error)) from error
        if after.status not in ("cancelling", "cancelled"):
            raise ApiError(409, f"{one.id} is {after.status} and cannot be cancelled any more", code="invalid_status")
        return JSONResponse(shown(store, after))

    add_route(routes, "POST", "/batches", create)
    add_route(routes, "GET", "/batches", batches)
    add_route(routes, "GET", "/batches/{identifier}", batch)
    add_route(routes, "POST", "/batches/{identifier}/cancel", cancel)
    return routes


def _batch(store: BatchStore, body: BatchOrder, request: Request) -> Batch:
    """What was ordered, as it begins. Raises ApiError."""
    endpoints = {name: name for name in get_args(Endpoint)}
    endpoint: Endpoint | None = endpoints.get(body.endpoint)
    if endpoint is None:
        raise unsupported("endpoint", f"{body.endpoint!r} has no batches on this node; take one of {', '.join(endpoints)}")
    if body.completion_window != "24h":
        raise unsupported("completion_window", f"{body.completion_window!r} is not possible; send '24h'")
    file = known(store, body.input_file_id, request)
    if file.purpose != "batch":
        raise ApiError(400, f"{file.id} is the output of a batch, and no input", param="input_file_id", code="invalid_value")
    now, asked_s = int(store.clock()), body.output_expires_after.seconds if body.output_expires_after else LONGEST_S
    return Batch(
        id=new_id("batch_"),
        owner=answered(request.scope).key,
        endpoint=endpoint,
        input_file_id=file.id,
        output_id=new_id("file-"),
        error_id=new_id("file-"),
        created_at=now,
        expires_at=now + WINDOW_S,
        is_clock_sure=store.clock_is_sure(),
        output_expires_s=min(asked_s, store.limits.keep.age_s),
        metadata=body.metadata,
    )


def _known(store: BatchStore, identifier: str, request: Request) -> Batch:
    batch = store.batch(identifier, answered(request.scope).key)
    if batch is None:
        raise ApiError(404, f"there is no batch {identifier[:80]!r}; see /v1/batches", code="batch_not_found")
    return batch


def shown(store: BatchStore, batch: Batch) -> dict[str, Any]:
    counts = store.counts(batch)
    errors = {"object": "list", "data": [error.model_dump() for error in batch.errors]} if batch.errors else None
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": None,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_id if batch.has_output else None,
        "error_file_id": batch.error_id if batch.has_errors else None,
        "created_at": batch.created_at,
        "in_progress_at": batch.in_progress_at,
        "expires_at": batch.expires_at,
        "finalizing_at": batch.finalizing_at,
        "completed_at": batch.completed_at,
        "failed_at": batch.failed_at,
        "expired_at": batch.expired_at,
        "cancelling_at": batch.cancelling_at,
        "cancelled_at": batch.cancelled_at,
        "request_counts": {"total": batch.total, "completed": counts.completed, "failed": counts.failed},
        "usage": _usage(counts),
        "metadata": batch.metadata,
    }


def _usage(counts: Counts) -> dict[str, Any]:
    return {
        "input_tokens": counts.input_tokens,
        "input_tokens_details": {"cached_tokens": counts.cached_tokens},
        "output_tokens": counts.output_tokens,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
        "total_tokens": counts.input_tokens + counts.output_tokens,
    }
