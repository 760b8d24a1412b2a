"""The operator's window: fleet, commands and events as JSON. Bound to loopback by default; with a token file every call needs the token."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from agent.protocol.messages import Command
from agent.protocol.topics import is_node_id
from agent.protocol.wire import MessageError
from coordinator.control import Control, NotConnected
from coordinator.registry import CommandRow, Registry


class SendRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    op: str
    args: dict[str, Any] = Field(default_factory=dict)
    deadline_s: float = Field(default=30.0, gt=0, le=86_400)


def build_app(control: Control, registry: Registry, token_file: Path | None) -> FastAPI:
    """The coordinator's API. `token_file` is read once; None leaves the API open to whoever reaches its port."""
    token = token_file.read_text().strip() if token_file else ""

    def authorised(authorization: Annotated[str, Header()] = "") -> None:
        if token and not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "give the coordinator's token as Authorization: Bearer …")

    app = FastAPI(title="Hotspare coordinator", docs_url=None, redoc_url=None)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "alive", "broker": control.is_connected, "term": control.term}

    app.include_router(_reading(control, registry), dependencies=[Depends(authorised)])
    app.include_router(_ordering(control, registry), dependencies=[Depends(authorised)])
    return app


def _reading(control: Control, registry: Registry) -> APIRouter:
    router = APIRouter()

    @router.get("/fleet")
    async def fleet() -> dict[str, Any]:
        views = {view.node: view for view in control.views()}
        probe = control.last_probe
        return {
            "broker_connected": control.is_connected,
            "primary": {
                "is_down": control.primary.is_down,
                "streak": control.primary.streak,
                "last_probe": {"is_good": probe.is_good, "latency_ms": round(probe.latency_ms, 1), "reason": probe.reason}
                if probe
                else None,
            },
            "nodes": [
                {
                    "node": row.node,
                    "is_online": views[row.node].is_online,
                    "is_ready": views[row.node].is_ready,
                    "is_drained": row.is_drained,
                    "mode": views[row.node].mode,
                    "epoch": row.epoch,
                    "lease": lease.kind if (lease := views[row.node].lease) else None,
                    "models": [model.name for model in row.state.models if model.status == "serving"] if row.state else [],
                }
                for row in registry.nodes()
            ],
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

    @router.get("/commands/{identifier}")
    async def command(identifier: str) -> dict[str, Any]:
        row = registry.command(identifier)
        if row is None:
            raise HTTPException(404, f"no command {identifier!r}")
        return _command(row)

    @router.get("/events")
    async def events(after: int = 0, limit: Annotated[int, Field(ge=1, le=1000)] = 100) -> list[dict[str, Any]]:
        return [{"number": number, **event} for number, event in registry.events(after, limit)]

    return router


def _ordering(control: Control, registry: Registry) -> APIRouter:
    router = APIRouter()

    @router.delete("/fleet/{node}")
    async def forget(node: str) -> dict[str, bool]:
        return {"forgotten": control.forget(node)}

    @router.post("/fleet/{node}/commands", status_code=202)
    async def send(node: str, request: SendRequest) -> dict[str, Any]:
        if not is_node_id(node) or registry.node(node) is None:
            raise HTTPException(404, f"no node {node!r} has registered; GET /fleet lists those that have")
        try:
            command: Command = await control.send(node, request.op, request.args, request.deadline_s)
        except MessageError as error:
            raise HTTPException(422, str(error)) from error
        except NotConnected as error:
            raise HTTPException(503, str(error)) from error
        if request.op in ("drain", "activate"):  # an operator's word on maintenance outlasts this order
            control.set_drained(node, request.op == "drain")
        return {"id": command.id, "epoch": command.epoch}

    return router


def _command(row: CommandRow) -> dict[str, Any]:
    return {
        "id": row.command.id,
        "op": row.command.op,
        "node": row.command.node,
        "epoch": row.command.epoch,
        "status": row.status,
        "is_final": row.is_final,
        "result": row.result.model_dump(mode="json", exclude_none=True) if row.result else None,
    }
