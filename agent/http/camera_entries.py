"""A camera as clients read it: how it is, and how it was told to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.cameras.health import words
from agent.http.context import Context
from agent.http.errors import ApiError
from agent.worker.addresses import redacted


def all_cameras(context: Context) -> dict[str, dict[str, Any]]:
    """Every camera that is wanted or still runs, by its id, with the worker's report or why there is none."""
    vision, orders = context.services.vision, context.services.cameras
    reports = {str(item["id"]): dict(item) for item in vision.cameras()} if vision else {}
    known = {
        view.id: {"id": view.id, "model": view.model, "state": view.status, "message": view.message}
        for view in context.services.node.snapshot().pipelines
    }
    ids = sorted({*reports, *(orders.settings() if orders else ())})
    entries = {}
    for camera in ids:
        report = reports.get(camera) or known.get(camera) or {"id": camera, "state": "starting", "message": ""}
        if known.get(camera, {}).get("state") == "failed":  # the worker goes on with what it had before an order that it refused
            report = {**report, "state": "failed", "message": known[camera]["message"]}
        entries[camera] = {**report, "health": words(camera, report)}
    return entries


def told(context: Context, camera: str) -> dict[str, Any]:
    entry = all_cameras(context).get(camera)
    if entry is None:
        raise unknown(camera)
    orders = context.services.cameras
    settings = orders.settings().get(camera) if orders else None
    if orders is None or settings is None:
        return entry
    return {**entry, "settings": _shown(settings), "origin": orders.origin(camera), "is_configured": orders.is_configured(camera)}


def _shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in settings.items() if name not in ("id", "media")}
    return {**shown, "source": redacted(str(settings.get("source", "")))}


def unknown(camera: str) -> ApiError:
    return ApiError(404, f"there is no camera {camera!r}; see /cameras", code="camera_not_found")
