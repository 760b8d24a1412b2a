"""A stand-in for the cloud API, with a switch: on it answers chat completions in OpenAI's shape, off it refuses connections.

It knows nothing and says so; what matters is who answers. Only the demo and the tests use it.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response
from starlette.types import ASGIApp

from agent.http.server import HttpServer, bind

logger = logging.getLogger(__name__)

ANSWER = "This is the stand-in for the cloud API: it is up, so your request never reached the edge. Switch it off and ask again."
MODEL = "cloud-stand-in"


def cloud_app() -> ASGIApp:
    """`POST /v1/chat/completions` (streamed or not) and `GET /v1/models`."""
    app = FastAPI(docs_url=None, redoc_url=None)

    @app.post("/v1/chat/completions")
    @app.post("/chat/completions")
    async def chat(request: Request) -> Response:
        try:
            asked: dict[str, Any] = dict(json.loads(await request.body()))
            words = ANSWER.split(" ")[: max(1, min(int(asked.get("max_tokens") or 64), 64))]
        except (ValueError, TypeError) as error:
            return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, 400, {"X-Served-By": "cloud"})
        model = str(asked.get("model", MODEL))
        headers = {"X-Served-By": "cloud"}
        if asked.get("stream"):
            return StreamingResponse(_stream(model, words), media_type="text/event-stream", headers=headers)
        message = {"role": "assistant", "content": " ".join(words)}
        usage = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": 1 + len(words)}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return JSONResponse({**_head(model, "chat.completion"), "choices": [choice], "usage": usage}, headers=headers)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "demo"}]}

    return app


class SwitchablePrimary:
    """The stand-in on a fixed port, and a control server whose `POST /switch?on=true|false` opens and closes that port."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, switch_port: int = 0) -> None:
        self._listener = bind(host, port)
        self._control = HttpServer(self._control_app(), bind(host, switch_port), stop_s=1.0)
        self._host = host
        self.port = int(self._listener.getsockname()[1])
        self.switch_url = f"{self._control.url}/switch"
        self.url = f"http://{host}:{self.port}"
        self._server: HttpServer | None = None
        self._wanted = True
        self._changed, self._settled = anyio.Event(), anyio.Event()

    @property
    def is_on(self) -> bool:
        return self._server is not None

    async def switch(self, on: bool) -> None:
        """Open or close the port; returns once it is so, or cannot be, see `is_on`. Raises TimeoutError after 10 s."""
        self._wanted = on
        self._changed.set()
        with anyio.fail_after(10.0):
            while self.is_on != on and self._wanted == on:
                await self._settled.wait()

    async def run(self) -> None:
        ended = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._control.run)
            while True:
                self._changed = anyio.Event()
                if self._wanted and self._server is None:
                    if (listener := self._open()) is None:
                        self._wanted = False
                    else:
                        self._server, ended = HttpServer(cloud_app(), listener, stop_s=1.0), anyio.Event()
                        tasks.start_soon(self._serve, self._server, ended)
                        await self._server.started.wait()
                elif not self._wanted and self._server is not None:
                    self._server.stop()
                    await ended.wait()
                    self._server = None
                done, self._settled = self._settled, anyio.Event()
                done.set()
                await self._changed.wait()

    async def _serve(self, server: HttpServer, ended: anyio.Event) -> None:
        await server.run()  # it closes the port itself: the event loop must not lose a descriptor that it still watches
        ended.set()

    def _open(self) -> socket.socket | None:
        """None: another program has taken the port while it was closed."""
        if self._listener.fileno() < 0:
            try:
                self._listener = bind(self._host, self.port)
            except OSError as error:
                logger.warning("the stand-in stays off: %s", error)
                return None
        return self._listener

    def _control_app(self) -> ASGIApp:
        app = FastAPI(docs_url=None, redoc_url=None)

        @app.get("/switch")
        async def state() -> dict[str, bool]:
            return {"on": self.is_on}

        @app.post("/switch")
        async def switch(on: bool) -> dict[str, bool]:
            await self.switch(on)
            return {"on": self.is_on}

        return app


def _head(model: str, kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-stand-in", "object": kind, "created": int(time.time()), "model": model}  # noqa: TID251 — a wire timestamp


async def _stream(model: str, words: list[str]) -> AsyncIterator[str]:
    head = _head(model, "chat.completion.chunk")
    deltas = [{"role": "assistant", "content": ""}, *({"content": word + " "} for word in words)]
    for delta in deltas:
        yield f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}\n\n"
        await anyio.sleep(0.03)
    yield f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'stop'}]})}\n\ndata: [DONE]\n\n"
