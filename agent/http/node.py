"""What the node says of itself: health, readiness, state, metrics; in the demo also the switch of the primary."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.responses import Response

from agent.http.collaborators import ModelView
from agent.http.context import Context
from agent.http.errors import ApiError, retry_after
from agent.http.metrics import CONTENT_TYPE
from agent.http.reasons import WORDS
from agent.mode import Refused

NO_STORE = {"Cache-Control": "no-store"}


def router(context: Context) -> APIRouter:
    routes = APIRouter()
    services = context.services

    async def alive() -> Response:
        """The event loop turns: that this answers is all it says."""
        return JSONResponse({"status": "alive"}, headers=NO_STORE)

    async def ready() -> Response:
        """200 where this node may be sent requests now, else 503 and why not."""
        now = services.node.snapshot()
        answer = services.gate()
        reasons = [f"mode {answer.mode}: {WORDS[answer.reason]}"] if isinstance(answer, Refused) else []
        if not any(model.status == "serving" for model in now.models):
            reasons.append("no model serves yet")
        body = {"status": "not ready" if reasons else "ready", "node": now.node, "mode": now.mode, "reasons": reasons}
        if not reasons:
            return JSONResponse(body, headers=NO_STORE)
        wait_s = answer.retry_after_s if isinstance(answer, Refused) else 5
        return JSONResponse(body, 503, headers={**NO_STORE, "Retry-After": retry_after(wait_s), "X-Hotspare-Mode": now.mode})

    for path, endpoint in (("/healthz", alive), ("/livez", alive), ("/readyz", ready)):
        routes.add_api_route(path, endpoint, methods=["GET"], response_model=None)
        routes.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)  # balancers use both

    @routes.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(context.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    @routes.get("/node", response_model=None)
    async def node() -> Response:
        answer = services.gate()
        now = services.node.snapshot()
        body: dict[str, Any] = asdict(now)
        body["serving"] = not isinstance(answer, Refused)
        body["reason_words"] = WORDS[answer.reason if isinstance(answer, Refused) else now.reason]
        body["demo"] = {"primary_is_on": await services.demo.primary_is_on()} if services.demo else None
        return JSONResponse(body, headers=NO_STORE)

    return routes


def models_router(context: Context) -> APIRouter:
    """/v1/models and one of them."""
    routes = APIRouter()
    services = context.services

    @routes.get("/v1/models", response_model=None)
    @routes.get("/models", response_model=None, include_in_schema=False)
    @routes.get("/beta/models", response_model=None, include_in_schema=False)
    async def models() -> Response:
        """Every name that a request may use, aliases included."""
        entries = [_entry(model, name) for model in services.node.models() for name in (model.name, *model.aliases)]
        return JSONResponse({"object": "list", "data": entries})

    @routes.get("/v1/models/{name:path}", response_model=None)
    @routes.get("/models/{name:path}", response_model=None, include_in_schema=False)
    @routes.get("/beta/models/{name:path}", response_model=None, include_in_schema=False)
    async def model(name: str) -> Response:
        for known in services.node.models():
            if name in (known.name, *known.aliases):
                return JSONResponse(_entry(known, name))
        raise ApiError(404, f"there is no model {name[:200]!r} on this node; see /v1/models", param="model", code="model_not_found")

    @routes.get("/user/balance", response_model=None)
    async def balance() -> Response:
        """DeepSeek's: may this client go on asking? Nothing is paid for here; a gateway asks its primary instead."""
        nothing = {"currency": "USD", "total_balance": "0.00", "granted_balance": "0.00", "topped_up_balance": "0.00"}
        return JSONResponse({"is_available": True, "balance_infos": [nothing]})

    return routes


def _entry(model: ModelView, name: str) -> dict[str, Any]:
    """OpenAI's fields, then ours. `created` is unknown to a node and not made up."""
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "hotspare",
        "hotspare": {"model": model.name, "task": model.task, "status": model.status, "engine": model.engine, "verdict": model.verdict},
    }
