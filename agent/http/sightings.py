"""/events: what the cameras saw, in pages, with the picture and the clip of each."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import anyio
from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from fastapi.responses import FileResponse, JSONResponse
from starlette.responses import Response

from agent.cameras.record import EventRecord
from agent.cameras.store import Filter
from agent.http.collaborators import Sightings
from agent.http.context import Context
from agent.http.errors import ApiError, invalid
from agent.link.store import StoreError
from agent.protocol.wire import wire_now

CAMERA_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
CameraId = Annotated[str, InPath(pattern=CAMERA_ID)]
EventId = Annotated[str, InPath(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
Limit = Annotated[int, Query(ge=1, le=200)]
Name = Annotated[str | None, Query(min_length=1, max_length=64)]
Camera = Annotated[str | None, Query(pattern=CAMERA_ID)]
Moment = Annotated[str | None, Query(max_length=40)]
Cursor = Annotated[str | None, Query(max_length=40)]
CLIP_COMES_S = 600.0
KEPT_FOR_EVER = {"Cache-Control": "private, max-age=86400"}
NO_STORE = {"Cache-Control": "no-store"}


def router(context: Context) -> APIRouter:
    routes = APIRouter(tags=["events"])

    @routes.get("/events", response_model=None)
    async def events(
        limit: Limit = 50, cursor: Cursor = None, camera: Camera = None, label: Name = None, zone: Name = None,
        since: Moment = None, until: Moment = None,
    ) -> Response:  # fmt: skip
        """The newest first. `since` and `until` are ISO 8601 or seconds since 1970; `next` goes in as `cursor` for the page after."""
        wanted = Filter(camera, label, zone, _moment("since", since), _moment("until", until))
        return await _page(context, wanted, cursor, limit)

    @routes.get("/cameras/{camera}/events", response_model=None)
    async def camera_events(
        camera: CameraId, limit: Limit = 50, cursor: Cursor = None, label: Name = None, zone: Name = None,
        since: Moment = None, until: Moment = None,
    ) -> Response:  # fmt: skip
        """Of a camera that is gone too, as long as they are kept."""
        wanted = Filter(camera, label, zone, _moment("since", since), _moment("until", until))
        return await _page(context, wanted, cursor, limit)

    @routes.get("/events/{event}", response_model=None)
    async def event(event: EventId) -> Response:
        known = await _known(context, event)
        return JSONResponse((await _entries(context, [known]))[0], headers=NO_STORE)

    @routes.get("/events/{event}/snapshot.jpg", response_model=None)
    async def snapshot(event: EventId) -> Response:
        """The best picture of it so far."""
        known = await _known(context, event)
        headers = KEPT_FOR_EVER if known.ended_at is not None else NO_STORE
        return await _file(_sightings(context).snapshot(known), "image/jpeg", headers, f"event {event} has no snapshot")

    @routes.get("/events/{event}/clip.mp4", response_model=None)
    async def clip(request: Request, event: EventId) -> Response:
        """The clip, or the part that a Range header asks for. 404 with Retry-After while it is still being written."""
        known = await _known(context, event)
        return await _file(_sightings(context).clip(known), "video/mp4", KEPT_FOR_EVER, _no_clip(known), known.has_clip)

    return routes


def entry(event: EventRecord, has_clip_file: bool, now: float) -> dict[str, Any]:
    """An event as clients read it. A clip is complete some seconds after the end of its event; one cut off by a crash never is."""
    width, height = event.picture
    may_come = event.ended_at is None or (event.ended_by == "object" and now - event.ended_at < CLIP_COMES_S)
    return {
        "id": event.id,
        "object": "event",
        "camera": event.camera,
        "label": event.label,
        "state": "open" if event.ended_at is None else "ended",
        "began_at": _iso(event.began_at),
        "ended_at": None if event.ended_at is None else _iso(event.ended_at),
        "ended_by": event.ended_by,
        "seen_for_s": event.seen_for_s if event.ended_at is not None else None,
        "score": event.score,
        "box": list(event.box),
        "snapshot_box": list(event.snapshot_box) or None,
        "width": width,
        "height": height,
        "zones": list(event.zones),
        "dwell_s": dict(event.dwell_s or {}),
        "loitering": list(event.loitering),
        "crossed": [{"line": line, "direction": direction} for line, direction in event.crossed],
        "snapshot": f"/events/{event.id}/snapshot.jpg" if event.has_snapshot else None,
        "clip": f"/events/{event.id}/clip.mp4" if event.has_clip and has_clip_file else None,
        "clip_is_coming": event.has_clip and not has_clip_file and may_come,
    }


async def _page(context: Context, wanted: Filter, cursor: str | None, limit: int) -> Response:
    before = None if cursor is None else _number_in(cursor)
    kept = context.services.sightings
    try:
        found = await kept.page(wanted, before, limit + 1) if kept is not None else ()
    except StoreError as error:
        raise _unreadable(error) from error
    shown, has_more = found[:limit], len(found) > limit
    following = _cursor(shown[-1].number) if has_more else None
    return JSONResponse({"object": "list", "data": await _entries(context, shown), "next": following}, headers=NO_STORE)


async def _entries(context: Context, events: Sequence[EventRecord]) -> list[dict[str, Any]]:
    kept, now = context.services.sightings, wire_now().timestamp()
    if kept is None or not events:
        return []
    files = await to_thread.run_sync(lambda: [event.has_clip and kept.clip(event).is_file() for event in events])
    return [entry(event, has_file, now) for event, has_file in zip(events, files, strict=True)]


async def _known(context: Context, identifier: str) -> EventRecord:
    try:
        event = await _sightings(context).event(identifier)
    except StoreError as error:
        raise _unreadable(error) from error
    if event is None:
        raise ApiError(404, f"there is no event {identifier!r}, or it was too old to be kept; see /events", code="event_not_found")
    return event


async def _file(file: Path, kind: str, headers: Mapping[str, str], absent: str, is_coming: bool = False) -> Response:
    if not await anyio.Path(file).is_file():
        raise ApiError(404, absent, code="not_found", headers={"Retry-After": "5"} if is_coming else {})
    return FileResponse(file, media_type=kind, headers=dict(headers))


def _no_clip(event: EventRecord) -> str:
    return f"the clip of event {event.id} is not complete yet" if event.has_clip else f"event {event.id} has no clip"


def _sightings(context: Context) -> Sightings:
    if context.services.sightings is None:
        raise ApiError(404, "this node keeps no events of cameras", code="not_found")
    return context.services.sightings


def _unreadable(error: StoreError) -> ApiError:
    return ApiError(503, f"the events cannot be read: {error}", type_="server_error", code="not_ready", headers={"Retry-After": "5"})


def _cursor(number: int) -> str:
    return base64.urlsafe_b64encode(f"e{number}".encode()).decode().rstrip("=")


def _number_in(cursor: str) -> int:
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        if text[:1] == "e" and text[1:].isascii() and text[1:].isdigit():
            return min(int(text[1:]), (1 << 63) - 1)
    except (binascii.Error, UnicodeDecodeError, ValueError):
        pass
    raise invalid("cursor", "cursor: this is none of ours; take `next` of the page before")


def _moment(name: str, text: str | None) -> float | None:
    """Seconds since 1970 from ISO 8601, UTC where it names no zone, or from seconds."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text.replace("Z", "+00:00"))  # 3.10 does not know the Z
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
        except (ValueError, OverflowError):
            seconds = float("nan")
    if not abs(seconds) < 1e11:
        raise invalid(name, f"{name}: {text!r} is no time; send ISO 8601 such as 2026-11-24T09:00:00Z, or seconds since 1970")
    return seconds


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
