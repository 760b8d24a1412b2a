"""/v1/deployments: which models this node serves or is about to, how far their engines are, and orders about them by hand.

Orders are for those who hold a key. Without keys they are taken from this machine only, and not through a balancer on it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.responses import Response

from agent.http.collaborators import Deployments, ModelView
from agent.http.context import Context
from agent.http.errors import ApiError
from agent.http.operators import refuse_strangers
from agent.http.requests import Body
from agent.protocol.operations import BuildPrecision, Target

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
ModelName = Annotated[str, Path(pattern=NAME)]


class DeployRequest(Body):
    """As the arguments of the command `model.deploy`."""

    model: Annotated[str, Field(pattern=NAME)]
    precision: BuildPrecision | None = None
    target: Target | None = None
    calibration: Annotated[str, Field(pattern=NAME)] | None = None
    accept_unverified: bool | None = None


def router(context: Context) -> APIRouter:
    routes = APIRouter(prefix="/v1/deployments", tags=["deployments"])
    services = context.services

    @routes.get("", response_model=None)
    async def deployments() -> Response:
        return JSONResponse({"object": "list", "data": [_entry(model) for model in services.node.models()]})

    @routes.get("/{name}", response_model=None)
    async def deployment(name: ModelName) -> Response:
        return JSONResponse(_entry(_known(context, name)), headers={"Cache-Control": "no-store"})

    @routes.post("", response_model=None)
    async def deploy(request: Request, body: DeployRequest) -> Response:
        """Serve a model, its engine built as told; one that failed or was cancelled is tried anew."""
        name = _orders(context, request).deploy(body.model, body.model_dump(exclude={"model"}, exclude_none=True))
        return JSONResponse({"object": "deployment", "id": name}, 202, headers={"Location": f"/v1/deployments/{name}"})

    @routes.delete("/{name}", response_model=None)
    async def cancel(request: Request, name: ModelName) -> Response:
        """End the build. What serves goes on serving; a model that only an order wanted, and that serves nothing yet, is forgotten."""
        return JSONResponse({"id": name, "object": "deployment", "cancelled": _orders(context, request).cancel(name)})

    return routes


def _orders(context: Context, request: Request) -> Deployments:
    services = context.services
    refuse_strangers(services, request)
    if services.deployments is None:
        raise ApiError(404, "this node takes no orders about models over HTTP", code="not_found")
    return services.deployments


def _known(context: Context, name: str) -> ModelView:
    for model in context.services.node.models():
        if name in (model.name, *model.aliases):
            return model
    raise ApiError(404, f"there is no deployment of {name!r} on this node; see /v1/deployments", param="model", code="model_not_found")


def _entry(model: ModelView) -> dict[str, Any]:
    facts = asdict(model)
    return {"id": facts.pop("name"), "object": "deployment", **facts}
