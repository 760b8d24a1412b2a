"""What every endpoint is given, and the few questions that most of them ask of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
from fastapi import APIRouter

from agent.http.collaborators import Limits, Services, TextService, VisionService
from agent.http.errors import ApiError
from agent.http.metrics import Metrics
from agent.http.paths import PREFIXES
from agent.protocol.wire import wire_now


@dataclass(frozen=True)
class Context:
    """`closing` is set when the server stops: streams without an end of their own end then. `places`: for what batches ask of the models at
    the same time, all of them together."""

    services: Services
    limits: Limits
    metrics: Metrics
    places: anyio.CapacityLimiter
    closing: anyio.Event = field(default_factory=anyio.Event)

    def text(self) -> TextService:
        if self.services.text is None:
            raise ApiError(404, "this node runs no text models", param="model", code="model_not_found")
        return self.services.text

    def vision(self) -> VisionService:
        if self.services.vision is None:
            raise ApiError(404, "this node runs no vision models", param="model", code="model_not_found")
        return self.services.vision

    def model_or_default(self, name: str | None, task: str) -> str:
        """`name`, or the first model that serves `task`. Raises ApiError if there is none."""
        if name:
            return name
        for model in self.services.node.models():
            if model.task == task and model.status == "serving":
                return model.name
        raise ApiError(404, f"no model serves {task} on this node; see /v1/models", param="model", code="model_not_found")


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def now_s() -> int:
    """Seconds since 1970 for `created`."""
    return int(wire_now().timestamp())


def add_post(router: APIRouter, path: str, endpoint: Callable[..., Any]) -> None:
    add_route(router, "POST", path, endpoint)


def add_route(router: APIRouter, method: str, path: str, endpoint: Callable[..., Any]) -> None:
    """Serve `path` at every base URL that clients of OpenAI and DeepSeek use."""
    for prefix in PREFIXES:
        router.add_api_route(prefix + path, endpoint, methods=[method], response_model=None, include_in_schema=prefix == "/v1")
