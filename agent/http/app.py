"""The application: all endpoints behind one door."""

from __future__ import annotations

from dataclasses import dataclass

import anyio
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from starlette.responses import Response
from starlette.types import ASGIApp

from agent.http import (
    batch,
    camera_orders,
    cameras,
    chat,
    completions,
    demo,
    deployments,
    detection,
    encoders,
    errors,
    node,
    page,
    rerank,
    responses,
    sightings,
    sla,
)
from agent.http.camera_metrics import CameraCollector
from agent.http.collaborators import Limits, Services
from agent.http.context import Context
from agent.http.device_metrics import DeviceCollector
from agent.http.front import Front
from agent.http.in_flight import AnsweredHere, InFlight
from agent.http.metrics import Metrics
from agent.http.streams import ClientLeft


@dataclass(frozen=True)
class Application:
    """`asgi` for a server; `in_flight` for draining; `closing` ends what would go on for ever, such as camera streams."""

    asgi: ASGIApp
    in_flight: InFlight
    closing: anyio.Event


def create_app(services: Services, registry: CollectorRegistry, limits: Limits | None = None) -> Application:
    """Wire the endpoints. Reads the page's files and nothing else."""
    limits = limits or Limits()
    metrics = Metrics(registry, services.node.snapshot)
    registry.register(DeviceCollector(services.node.snapshot))
    if services.vision is not None:
        registry.register(CameraCollector(services.vision, services.sightings))
    context = Context(services, limits, metrics)
    in_flight, here = InFlight(), InFlight()
    # The interactive documentation of FastAPI loads scripts from a CDN; the schema at /openapi.json is enough.
    app = FastAPI(title="Hotspare", docs_url=None, redoc_url=None, redirect_slashes=False)
    errors.install(app)

    async def client_left(_: Request, __: Exception) -> Response:
        metrics.disconnects.inc()
        return Response(status_code=499)

    app.add_exception_handler(ClientLeft, client_left)
    for part in (chat, completions, responses, encoders, rerank, batch, detection, cameras, camera_orders, sightings, deployments, node):
        app.include_router(part.router(context))
    app.include_router(node.models_router(context))
    app.include_router(sla.router(services.sla))
    if services.demo is not None:
        app.include_router(demo.router(services.demo))
    app.include_router(page.router())
    bounded = AnsweredHere(app, limits.in_flight, here)
    layered = services.around(bounded) if services.around else bounded
    return Application(Front(layered, services, limits, metrics, in_flight, here), in_flight, context.closing)
