"""Orders about cameras over HTTP: added, changed, taken away, given back to the configuration file. For operators."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from agent.cameras.orders import CameraRefused
from agent.cameras.settings import CAMERA_ID
from agent.http.camera_entries import told
from agent.http.collaborators import Cameras
from agent.http.context import Context
from agent.http.errors import ApiError
from agent.http.operators import refuse_strangers

NewCameraId = Annotated[str, Path(pattern=CAMERA_ID)]
Settings = Annotated[dict[str, Any], Body()]

# reason of a refusal -> status, OpenAI's type, code for the client
REFUSALS: dict[str, tuple[int, str, str]] = {
    "invalid": (400, "invalid_request_error", "invalid_value"),
    "unknown_camera": (404, "invalid_request_error", "camera_not_found"),
    "busy": (409, "invalid_request_error", "too_many_cameras"),
    "no_space": (507, "server_error", "no_space"),
}


def router(context: Context) -> APIRouter:
    routes = APIRouter(prefix="/cameras", tags=["cameras"])

    @routes.put("/{camera}", response_model=None)
    async def replace(request: Request, camera: NewCameraId, settings: Settings) -> Response:
        """Add a camera, or give it settings in the place of all it had. 202 while its model is on its way."""
        return await _ordered(context, request, camera, lambda orders: orders.replace(camera, settings))

    @routes.patch("/{camera}", response_model=None)
    async def change(request: Request, camera: NewCameraId, patch: Settings) -> Response:
        """Change some settings, as JSON Merge Patch (RFC 7396): null takes a setting away."""
        return await _ordered(context, request, camera, lambda orders: orders.change(camera, patch))

    @routes.delete("/{camera}", response_model=None)
    async def remove(request: Request, camera: NewCameraId) -> Response:
        """Stop a camera for good; what it saw stays for its time."""
        try:
            await _orders(context, request).remove(camera)
        except CameraRefused as error:
            raise _refused(error) from error
        return JSONResponse({"id": camera, "object": "camera", "deleted": True})

    @routes.delete("/{camera}/changes", response_model=None)
    async def reset(request: Request, camera: NewCameraId) -> Response:
        """Back to what the configuration file says of it."""
        try:
            has_changed = await _orders(context, request).reset(camera)
        except CameraRefused as error:
            raise _refused(error) from error
        return JSONResponse({"id": camera, "object": "camera", "changed": has_changed})

    return routes


async def _ordered(context: Context, request: Request, camera: str, order: Callable[[Cameras], Awaitable[bool]]) -> Response:
    try:
        is_running = await order(_orders(context, request))
    except CameraRefused as error:
        raise _refused(error) from error
    return JSONResponse(told(context, camera), 200 if is_running else 202, headers={"Cache-Control": "no-store"})


def _orders(context: Context, request: Request) -> Cameras:
    refuse_strangers(context.services, request)
    if context.services.cameras is None:
        raise ApiError(404, "this node takes no orders about cameras over HTTP", code="not_found")
    return context.services.cameras


def _refused(error: CameraRefused) -> ApiError:
    status, type_, code = REFUSALS.get(error.reason, REFUSALS["invalid"])
    return ApiError(status, str(error), type_=type_, param=error.field, code=code)
