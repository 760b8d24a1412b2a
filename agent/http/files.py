"""/v1/files: what batches read and write, in OpenAI's form. A key sees its own only."""

from __future__ import annotations

from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.responses import Response

from agent.batches.record import FileRecord
from agent.batches.store import BatchStore, NoRoom, no_room
from agent.http.context import Context, add_route
from agent.http.errors import ApiError, invalid, unsupported
from agent.http.outcome import answered
from agent.http.paging import Order, page
from agent.http.upload import Form, read_form

HOUR_S = 3600
LONGEST_S = 30 * 24 * HOUR_S  # OpenAI's
UPLOADS = 2  # at the same time: what comes is not counted as taken before it is there

Cursor = Annotated[str | None, Query(max_length=80)]


def router(context: Context) -> APIRouter:
    routes = APIRouter()
    uploads = anyio.CapacityLimiter(UPLOADS)

    async def create(request: Request) -> Response:
        """Take a file for a batch."""
        store = store_of(context)
        try:
            uploads.acquire_nowait()
        except anyio.WouldBlock as error:
            raise busy(f"{UPLOADS} files are being uploaded already; try again soon") from error
        try:
            return JSONResponse(shown(await _uploaded(store, request)))
        except NoRoom as error:
            raise full(error) from error
        finally:
            uploads.release()

    async def files(
        request: Request,
        after: Cursor = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Order = "desc",
        purpose: Annotated[str | None, Query(max_length=80)] = None,
    ) -> Response:
        """The newest first."""
        own = (file for file in store_of(context).files.values() if is_own(request, file.owner) and purpose in (None, file.purpose))
        return JSONResponse(page(own, shown, after, limit, order))

    async def file(identifier: str, request: Request) -> Response:
        return JSONResponse(shown(known(store_of(context), identifier, request)))

    async def content(identifier: str, request: Request) -> Response:
        store = store_of(context)
        one = known(store, identifier, request)
        return FileResponse(store.content(one.id), media_type="application/octet-stream", filename=one.filename)

    async def delete(identifier: str, request: Request) -> Response:
        """One that a batch reads stays until that is over."""
        store = store_of(context)
        one = known(store, identifier, request)
        if (batch := store.using(one.id)) is not None:
            raise ApiError(
                409, f"{one.id} belongs to {batch.id}, which is not over; cancel that first, or wait for its end", code="file_in_use"
            )
        try:
            await store.delete(one.id)
        except OSError as error:
            raise full(no_room(error)) from error
        return JSONResponse({"id": one.id, "object": "file", "deleted": True})

    add_route(routes, "POST", "/files", create)
    add_route(routes, "GET", "/files", files)
    add_route(routes, "GET", "/files/{identifier}", file)
    add_route(routes, "GET", "/files/{identifier}/content", content)
    add_route(routes, "DELETE", "/files/{identifier}", delete)
    return routes


async def _uploaded(store: BatchStore, request: Request) -> FileRecord:
    """Raises ApiError, NoRoom, and what reading the body raises; nothing is left of the file then."""
    length = request.headers.get("content-length", "0")
    await store.may_come(int(length[:20]) if length.isascii() and length.isdigit() else 0)
    upload = await store.begin_upload()
    try:
        form = await read_form(request, upload, store.room_on_disk, store.limits.file_bytes)
        expires_s = _checked(form, store.limits.keep.age_s)
        return await store.add(upload, form.size, answered(request.scope).key, form.filename or "", expires_s)
    except OSError as error:
        raise no_room(error) from error
    finally:
        await store.drop_upload(upload)


def _checked(form: Form, longest_s: int) -> int:
    """How long the file is kept. Raises ApiError."""
    fields = form.fields
    purpose = fields.get("purpose")
    if purpose is None:
        raise ApiError(400, "purpose: this field is required; send 'batch'", param="purpose", code="missing_required_parameter")
    if purpose != "batch":
        raise unsupported("purpose", f"this node takes no files for {purpose[:40]!r}; send 'batch'")
    if form.filename is None:
        raise ApiError(400, "file: this field is required", param="file", code="missing_required_parameter")
    if not form.size:
        raise invalid("file", "file: it is empty")
    for name in fields.keys() - {"purpose", "expires_after[anchor]", "expires_after[seconds]"}:
        raise ApiError(400, f"unrecognised request argument: {name}", param=name, code="unknown_parameter")
    seconds = fields.get("expires_after[seconds]")
    if seconds is None:
        return longest_s
    if fields.get("expires_after[anchor]") != "created_at":
        raise invalid("expires_after", "expires_after.anchor: only 'created_at' is possible")
    if not (seconds.isascii() and seconds.isdigit() and HOUR_S <= int(seconds[:12]) <= LONGEST_S):
        raise invalid("expires_after", f"expires_after.seconds: {seconds[:40]!r} is no number from {HOUR_S} to {LONGEST_S}")
    return min(int(seconds), longest_s)


def shown(file: FileRecord) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def store_of(context: Context) -> BatchStore:
    if context.services.batches is None:
        raise ApiError(404, "this node keeps no files for batches", code="not_found")
    return context.services.batches


def is_own(request: Request, owner: str) -> bool:
    return answered(request.scope).key in ("", owner)


def known(store: BatchStore, identifier: str, request: Request) -> FileRecord:
    """Another's file is as one that does not exist. Raises ApiError."""
    file = store.file(identifier, answered(request.scope).key)
    if file is None:
        raise ApiError(404, f"there is no file {identifier[:80]!r}, or it was kept long enough; see /v1/files", code="file_not_found")
    return file


def full(error: NoRoom) -> ApiError:
    return ApiError(507, str(error), type_="server_error", code="insufficient_storage", headers={"Retry-After": "60"})


def busy(message: str) -> ApiError:
    return ApiError(429, message, type_="rate_limit_error", code="busy", headers={"Retry-After": "5"})
