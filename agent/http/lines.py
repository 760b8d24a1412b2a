"""Asks one line of a batch as a request to this node's own endpoint: checked, answered and refused as any other, but it can wait.

It goes neither through the door nor through the gateway: as with /v1/batch, this node answers.
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message

from agent.batches.line import Line, Reply
from agent.batches.record import Batch
from agent.batches.store import new_id
from agent.http.allowance import Allowances
from agent.http.collaborators import Services
from agent.http.front import tenant_of
from agent.http.outcome import KEY, Answered

logger = logging.getLogger(__name__)

NOBODY = "batches"  # whose lines they are where no key is asked for


class LineDesk:
    """`app`: the endpoints. Lines share `places` with the items of /v1/batch; encoders know no priority, so they get one at a time."""

    def __init__(self, app: ASGIApp, services: Services, places: anyio.CapacityLimiter, allowances: Allowances) -> None:
        self._app = app
        self._services = services
        self._places = places
        self._encoders = anyio.CapacityLimiter(1)
        self._allowances = allowances

    async def ask(self, batch: Batch, line: Line) -> Reply:
        """A key pays for the tokens of its lines; that it sends many is no matter, for they wait. Whatever fails is the line's answer."""
        try:
            return await self._asked(batch, line)
        except Exception:
            logger.exception("line %d of %s failed on %s", line.number, batch.id, batch.endpoint)
            return refusal(500, "internal_error", "the node failed on this request; its log has the cause")

    async def _asked(self, batch: Batch, line: Line) -> Reply:
        keys, key = self._services.keys(), bytes.fromhex(batch.owner)
        if keys and key:
            if key not in keys:
                return refusal(401, "invalid_api_key", "the key that this batch was made with is no longer one of this node")
            if wait_s := self._allowances.overdrawn_s(key, keys):
                return refusal(429, "rate_limit_exceeded", "the key has used its tokens a minute", wait_s)
        note = Answered(tenant=tenant_of(batch.owner) or NOBODY, can_wait=True)
        if batch.endpoint == "/v1/embeddings":
            async with self._encoders:
                reply = await self._post(batch.endpoint, line, note)
        else:
            async with self._places:
                reply = await self._post(batch.endpoint, line, note)
        if keys and key:
            self._allowances.pay(key, note.tokens)
        return reply

    async def _post(self, path: str, line: Line, note: Answered) -> Reply:
        scope: dict[str, Any] = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
            "raw_path": path.encode(), "root_path": "", "query_string": b"", "client": None, "server": None,
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(line.body))], KEY: note,
        }  # fmt: skip
        is_read, status, headers, body = False, 0, Headers(), bytearray()

        async def receive() -> Message:
            nonlocal is_read
            if is_read:
                await anyio.sleep_forever()
            is_read = True
            return {"type": "http.request", "body": line.body, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], Headers(raw=message["headers"])
            else:
                body.extend(message.get("body", b""))

        await self._app(scope, receive, send)
        if not status or not body or note.has_failed:
            raise RuntimeError(f"the endpoint ended with status {status} and {len(body)} bytes")
        return Reply(status, bytes(body), new_id("req_"), _seconds(headers.get("retry-after", "")))


def refusal(status: int, code: str, message: str, retry_s: float = 0.0) -> Reply:
    """An answer in OpenAI's shape, as the endpoint would have given it."""
    kinds = {401: "authentication_error", 429: "tokens"}
    error = {"message": message, "type": kinds.get(status, "server_error"), "param": None, "code": code}
    return Reply(status, json.dumps({"error": error}).encode(), new_id("req_"), math.ceil(retry_s))


def _seconds(header: str) -> float:
    return float(header[:6]) if header.isascii() and header.isdigit() else 0.0
