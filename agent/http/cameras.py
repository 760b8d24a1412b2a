"""/cameras: what the pipelines see, as JSON, as one picture, as a stream of pictures."""

from __future__ import annotations

from typing import Annotated

import anyio
from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse
from starlette.responses import Response

from agent.http.camera_entries import all_cameras, told, unknown
from agent.http.context import Context
from agent.http.errors import ApiError
from agent.http.streams import PictureStream

FIRST_FRAME_S = 10.0
CameraId = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def router(context: Context) -> APIRouter:
    routes = APIRouter(prefix="/cameras", tags=["cameras"])
    watchers = 0

    @routes.get("", response_model=None)
    async def cameras() -> Response:
        return JSONResponse({"object": "list", "data": list(all_cameras(context).values())})

    @routes.get("/{camera}", response_model=None)
    async def camera(camera: CameraId) -> Response:
        """How it is, and how it was told to be; a password in its source is not shown."""
        return JSONResponse(told(context, camera), headers={"Cache-Control": "no-store"})

    @routes.get("/{camera}/snapshot.jpg", response_model=None)
    async def snapshot(camera: CameraId, boxes: bool = True) -> Response:
        """The next picture, with what was seen drawn in; `boxes=0`: without."""
        with anyio.move_on_after(FIRST_FRAME_S):
            jpeg = await context.vision().snapshot(_seeing(context, camera), "drawn" if boxes else "plain")
            return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": "no-store"})
        raise _silent(camera)

    @routes.get("/{camera}/stream.mjpg", response_model=None)
    async def stream(camera: CameraId, boxes: bool = True) -> Response:
        nonlocal watchers
        if watchers >= context.limits.watchers:
            raise ApiError(
                503, f"{watchers} viewers already watch this node's cameras, its limit; use snapshot.jpg", type_="server_error",
                code="too_many_viewers", headers={"Retry-After": "10"},
            )  # fmt: skip
        frames = context.vision().frames(_seeing(context, camera), "drawn" if boxes else "plain")

        def gone() -> None:
            nonlocal watchers
            watchers -= 1

        watchers += 1
        return PictureStream(frames, context.closing, gone)

    return routes


def _seeing(context: Context, camera: str) -> str:
    """The camera's id. Raises ApiError where the worker has no such camera now, or it is paused."""
    if all(item["id"] != camera or item.get("state") == "paused" for item in context.vision().cameras()):
        entry = all_cameras(context).get(camera)
        if entry is None:
            raise unknown(camera)
        raise ApiError(503, entry["health"], type_="server_error", code="camera_silent", headers={"Retry-After": "5"})
    return camera


def _silent(camera: str) -> ApiError:
    return ApiError(
        503, f"camera {camera!r} gave no picture within {FIRST_FRAME_S:g} s; /cameras/{camera} says how it is", type_="server_error",
        code="camera_silent", headers={"Retry-After": "5"},
    )  # fmt: skip
