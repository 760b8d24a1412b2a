"""/sla: how well clients were served by the hour and the day, beside what was promised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.responses import Response


def router(report: Callable[[], Mapping[str, Any]] | None) -> APIRouter:
    routes = APIRouter()

    @routes.get("/sla", response_model=None)
    async def sla() -> Response:
        """null: this node keeps no record."""
        return JSONResponse(report() if report else None, headers={"Cache-Control": "no-store"})

    return routes
