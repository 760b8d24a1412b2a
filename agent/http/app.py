"""The application: all endpoints behind one door."""

from __future__ import annotations

import time
from dataclasses import dataclass

import anyio
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

from agent.batches.runner import Ask
from agent.http import (
    batch,
    batches,
    camera_orders,
    cameras,
    chat,
    completions,
    demo,
    deployments,
    detection,
    encoders,
    errors,
    files,
    node,
    page,
    rerank,
    responses,
    sightings,
    sla,
)
from agent.http.allowance import Allowances
from agent.http.batch_metrics import BatchCollector
from agent.http.camera_metrics import CameraCollector
from agent.http.collaborators import Limits, Services
from agent.http.context import Context
from agent.http.device_metrics import DeviceCollector
from agent.http.front import Front
from agent.http.in_flight import AnsweredHere, InFlight
from agent.http.lines import LineDesk
from agent.http.metrics import Metrics
from agent.http.streams import ClientLeft


@dataclass(frozen=True)
class Application:
    """`asgi` for a server; `in_flight` for draining; `closing` ends what would go on for ever, such as camera streams; `ask` answers the
    lines of batches."""

    asgi: ASGIApp
    in_flight: InFlight
    closing: anyio.Event
    ask: Ask


def create_app(services: Services, registry: CollectorRegistry, limits: Limits | None = None) -> Application:
    """Wire the endpoints. Reads the page's files and nothing else."""
    limits = limits or Limits()
    metrics = Metrics(registry, services.node.snapshot)
    registry.register(DeviceCollector(services.node.snapshot))
    if services.vision is not None:
        registry.register(CameraCollector(services.vision, services.sightings))
    if services.batches is not None:
        registry.register(BatchCollector(services.batches))
    context = Context(services, limits, metrics, anyio.CapacityLimiter(limits.batch_items))
    allowances = Allowances(time.monotonic)
    in_flight, here = InFlight(), InFlight()
    # The interactive documentation of FastAPI loads scripts from a CDN; the schema at /openapi.json is enough.
    app = FastAPI(title="Hotspare", docs_url=None, redoc_url=None, redirect_slashes=False)
    errors.install(app)

    async def client_left(_: Request, __: Exception) -> Response:
        metrics.disconnects.inc()
        return Response(status_code=499)

    for left in (ClientLeft, ClientDisconnect):  # while its answer was made, while its body came
        app.add_exception_handler(left, client_left)
    text, vision = (chat, completions, responses, encoders, rerank, batch, files, batches), (detection, cameras, camera_orders, sightings)
    for part in (*text, *vision, deployments, node):
        app.include_router(part.router(context))
    app.include_router(node.models_router(context))
    app.include_router(sla.router(services.sla))
    if services.demo is not None:
        app.include_router(demo.router(services.demo))
    app.include_router(page.router())
    bounded = AnsweredHere(app, limits.in_flight, here)
    layered = services.around(bounded) if services.around else bounded
    front = Front(layered, services, limits, metrics, in_flight, here, allowances)
    return Application(front, in_flight, context.closing, LineDesk(app, services, context.places, allowances).ask)
