"""The operator's window: a page, and fleet, commands and events as JSON. Bound to loopback by default.

With a token file every call needs the token, but for the page itself, which holds no data; without one, `callers.py` says who may order.
"""

from __future__ import annotations

import hmac
import sqlite3
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from agent.http.page import serving
from agent.link.broker import LinkLost, PublishRefused
from agent.protocol.messages import DesiredModel, DesiredPipeline
from agent.protocol.wire import MessageError, wire_now
from agent.worker.addresses import redacted
from coordinator import page
from coordinator.callers import refusal
from coordinator.control import Control
from coordinator.orders import NotActing
from coordinator.registry import NO_NUMBER, CommandRow, Registry
from coordinator.summary import Known, summary

FAILURES: dict[type[Exception], int] = {MessageError: 422, NotActing: 409, PublishRefused: 502, LinkLost: 503, sqlite3.Error: 503}


class SendRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    op: str
    args: dict[str, Any] = Field(default_factory=dict)
    deadline_s: float = Field(default=30.0, gt=0, le=86_400)


class WantRequest(BaseModel):
    """A whole document: what it does not name is not wanted."""

    model_config = ConfigDict(extra="forbid")

    models: list[Annotated[DesiredModel, BeforeValidator(lambda given: {"name": given} if isinstance(given, str) else given)]] = Field(
        default_factory=list, max_length=64
    )
    pipelines: list[DesiredPipeline] = Field(default_factory=list, max_length=64)


def build_app(control: Control, registry: Registry, token_file: Path | None, host: str = "127.0.0.1") -> FastAPI:
    """The coordinator's API and page. `token_file` is read once; None leaves the API open to whoever reaches its port at `host`.

    Raises OSError if the token cannot be read, ValueError if it is empty.
    """
    token = token_file.read_text().strip() if token_file else ""
    if token_file and not token:
        raise ValueError(f"token file {token_file} is empty; write a token or take the setting out")

    def authorised(authorization: Annotated[str, Header()] = "") -> None:
        if token and not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "give the coordinator's token as Authorization: Bearer …")

    def unforced(request: Request) -> None:
        if (problem := refusal(request.method, request.headers, host, bool(token))) is not None:
            raise HTTPException(*problem)

    async def failed(_request: Request, error: Exception) -> JSONResponse:
        status = next(status for kind, status in FAILURES.items() if isinstance(error, kind))
        return JSONResponse({"detail": str(error)}, status)

    app = FastAPI(title="Hotspare coordinator", docs_url=None, redoc_url=None, openapi_url=None)
    for kind in FAILURES:
        app.add_exception_handler(kind, failed)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "alive", "broker": control.is_connected, "term": control.term}

    app.include_router(_reading(control, registry), dependencies=[Depends(authorised)])
    app.include_router(_ordering(control, registry), dependencies=[Depends(authorised), Depends(unforced)])
    app.include_router(serving(page.sources(), page.POLICY))
    return app


def _reading(control: Control, registry: Registry) -> APIRouter:
    router = APIRouter()

    @router.get("/fleet")
    async def fleet() -> JSONResponse:
        """Everything that a list of the fleet needs, in one answer; written out here because it may be long."""
        rival, now_s, now = control.orders.rival, anyio.current_time(), wire_now()
        is_down, problems = control.primary.health.is_down, control.problems.open
        return JSONResponse(
            {
                "coordinator": control.name,
                "broker_connected": control.is_connected,
                "term": control.term,
                "rival": rival.coordinator if rival else None,
                "problems": problems,
                "messages_dropped": control.problems.faults,
                "primary": _primary(control),
                "last_event": registry.last_event(),
                "nodes": [summary(known, is_down, now_s, now) for known in _known(control, registry)],
            }
        )

    @router.get("/primary")
    async def primary() -> dict[str, Any]:
        """The last hour of it and of who answered in its place, the oldest first."""
        settings = control.primary.settings
        stretches = [
            {
                "number": stretch.number,
                "began_at": stretch.began_at.isoformat(),
                "probes": stretch.probes,
                "failed": stretch.failed,
                "latency_ms": None if stretch.latency_ms is None else round(stretch.latency_ms, 1),
                "reason": stretch.reason,
                "is_down": stretch.is_down,
                "serving": stretch.serving,
                "names": stretch.names,
            }
            for stretch in control.primary.past.stretches
        ]
        return {
            **_primary(control),
            "url": settings.url,
            "interval_s": settings.interval_s,
            "now": wire_now().isoformat(),
            "past": stretches,
        }

    @router.get("/fleet/{node}")
    async def show(node: str) -> dict[str, Any]:
        row = registry.node(node)
        if row is None:
            raise HTTPException(404, f"no node {node!r} has registered; GET /fleet lists those that have")
        parts = {"presence": row.presence, "meta": row.meta, "state": row.state, "heartbeat": row.heartbeat}
        return {
            "node": row.node,
            "epoch": row.epoch,
            "is_drained": row.is_drained,
            **{name: part.model_dump(mode="json", exclude_none=True) if part else None for name, part in parts.items()},
            "commands": [_command(entry) for entry in registry.commands(node, 20)],
        }

    @router.get("/fleet/{node}/desired")
    async def desired(node: str) -> dict[str, Any]:
        """The document without passwords, and how far the node is with it."""
        document = registry.desired(node)
        if document is None:
            raise HTTPException(404, f"nothing is wanted of node {node!r} from here: its own configuration counts")
        pipelines = [{**one.model_dump(mode="json"), "source": redacted(one.source)} for one in document.pipelines]
        models = [model.model_dump(mode="json", exclude_none=True) for model in document.models]
        row = registry.node(node)
        reported = row.state if row else None
        taken = {"taken_rev": reported.desired_rev, "applied_rev": reported.applied_rev} if reported else {}
        return {"rev": document.rev, "models": models, "pipelines": pipelines, **taken}

    @router.get("/commands/{identifier}")
    async def command(identifier: str) -> dict[str, Any]:
        row = registry.command(identifier)
        if row is None:
            raise HTTPException(404, f"no command {identifier!r}")
        return _command(row)

    @router.get("/events")
    async def events(
        after: Annotated[int, Query(ge=0, lt=1 << 63)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[int, Query(ge=1, lt=1 << 63)] = NO_NUMBER,
    ) -> list[dict[str, Any]]:
        """After a number the next `limit`, else the newest; of those before `before`. The oldest first."""
        return [{"number": number, **event} for number, event in registry.events(after, limit, before)]

    return router


def _ordering(control: Control, registry: Registry) -> APIRouter:
    router = APIRouter()

    @router.delete("/fleet/{node}")
    async def forget(node: str) -> dict[str, bool]:
        if not await control.forget(node):
            raise HTTPException(404, f"no node {node!r} has registered; GET /fleet lists those that have")
        return {"forgotten": True}

    @router.post("/fleet/{node}/commands", status_code=202)
    async def send(node: str, request: SendRequest) -> dict[str, Any]:
        """`is_sent` false: the broker is away; the order goes out within its deadline or ends as `expired`."""
        if registry.node(node) is None:
            raise HTTPException(404, f"no node {node!r} has registered; GET /fleet lists those that have")
        command, is_sent = await control.orders.send(node, request.op, request.args, request.deadline_s)
        return {"id": command.id, "epoch": command.epoch, "is_sent": is_sent}

    @router.put("/fleet/{node}/desired")
    async def want(node: str, request: WantRequest) -> dict[str, Any]:
        """`is_sent` false: the broker is away; the document goes out as soon as it is back."""
        if registry.node(node) is None:
            raise HTTPException(404, f"no node {node!r} has registered; GET /fleet lists those that have")
        document, is_sent = await control.desired.want(node, request.models, request.pipelines)
        return {"rev": document.rev, "is_sent": is_sent}

    return router


def _primary(control: Control) -> dict[str, Any]:
    health, probe = control.primary.health, control.primary.last_probe
    last = {"is_good": probe.is_good, "latency_ms": round(probe.latency_ms, 1), "reason": probe.reason} if probe else None
    past = control.primary.past.stretches
    newest = past[-1].number if past else 0
    return {"is_down": health.is_down, "is_certain": health.is_certain, "last_probe": last, "newest": newest}


def _known(control: Control, registry: Registry) -> Iterator[Known]:
    views, problems = control.views(), control.problems.open
    for row in registry.nodes():
        node = row.node
        yield Known(
            row, views[node], control.presence_of(node), control.silence_of(node), registry.wanted_revision(node), problems.get(node, "")
        )


def _command(row: CommandRow) -> dict[str, Any]:
    return {
        "id": row.command.id,
        "op": row.command.op,
        "node": row.command.node,
        "epoch": row.command.epoch,
        "status": row.status,
        "is_final": row.is_final,
        "issued_at": datetime.fromtimestamp(row.issued_s, timezone.utc).isoformat(timespec="seconds"),
        "result": row.result.model_dump(mode="json", exclude_none=True) if row.result else None,
    }
