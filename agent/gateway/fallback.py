"""The words of this node when it answers for the primary: what only the primary can do is no fault of the client."""

from __future__ import annotations

import json
from collections.abc import Callable

from starlette.types import Message, Receive, Scope, Send

from agent.http.errors import ApiError, retry_after

MAX_HELD_BYTES = 64 << 10
# What a client may ask of the primary, and a small model on a small device may lack.
BEYOND_US = frozenset({"unsupported_parameter", "unknown_parameter", "model_not_found", "context_length_exceeded"})


def unavailable(why: str, cause: str, retry_s: float) -> ApiError:
    return ApiError(
        503, f"the primary does not answer ({cause or 'it is being tried'}), and this node cannot stand in: {why}", type_="server_error",
        code="primary_unavailable", headers={"Retry-After": retry_after(max(1.0, retry_s))},
    )  # fmt: skip


def honest(scope: Scope, receive: Receive, send: Send, cause: str, retry_s: Callable[[], float]) -> Send:
    """`send` that turns "400: this node does not support it" into 503 with the cause: the same request is good for the primary."""
    held: list[Message] = []

    async def next_message(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] in (400, 404, 422):
            held.append(message)
            return
        if not held:
            await send(message)
            return
        held.append(message)
        size = sum(len(part.get("body", b"")) for part in held)
        if message.get("more_body") and size <= MAX_HELD_BYTES:
            return
        messages, held[:] = held[:], []
        if problem := _beyond_us(b"".join(part.get("body", b"") for part in messages)):
            await unavailable(problem, cause, retry_s()).response()(scope, receive, send)
            return
        for part in messages:
            await send(part)

    return next_message


def _beyond_us(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"]) if error["code"] in BEYOND_US else ""
    except (ValueError, KeyError, TypeError):
        return ""
