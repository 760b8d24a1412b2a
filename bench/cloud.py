"""A stand-in for the cloud API that fails on order, for bench/gateway.py."""

from __future__ import annotations

import json

import anyio
from starlette.types import Receive, Scope, Send

WORDS = 64


def chunk(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "cloud", "choices": [choice]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


class Answer:
    """One answer of the stand-in, on its way to the client."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def begin(self, status: int, kind: str) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]})

    async def part(self, data: bytes, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


async def primary(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers as fast as it can, or fails in the way that the field `user` names."""
    if scope["type"] != "http":
        return
    body, message = b"", await receive()
    while message.get("more_body"):
        body, message = body + message.get("body", b""), await receive()
    asked = json.loads(body + message.get("body", b""))
    fault, answer = asked.get("user", ""), Answer(send)
    if fault.isdigit():
        await answer.begin(int(fault), "application/json")
        await answer.part(b'{"error":{"message":"no"}}', more=False)
    elif not asked.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": "word " * WORDS}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 8, "completion_tokens": WORDS, "total_tokens": 8 + WORDS}
        await answer.begin(200, "application/json")
        await answer.part(json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}).encode(), more=False)
    elif fault:
        await fail(answer, fault)
    else:
        await answer.begin(200, "text/event-stream")
        for _ in range(WORDS):
            await answer.part(chunk("word "))
        await answer.part(chunk("", "stop") + b"data: [DONE]\n\n", more=False)


async def fail(answer: Answer, fault: str) -> None:
    if fault != "hang":
        await answer.begin(200, "text/event-stream")
    if fault == "head then hang":
        await answer.part(b": begun\n\n")
    elif fault == "garbage":
        await answer.part(b"data: <html>\n\n", more=False)
        return
    elif fault == "comments only":
        for _ in range(300):
            await answer.part(b": keep-alive\n\n")
            await anyio.sleep(0.05)
    elif fault in ("cut", "stalled"):
        await answer.part(chunk("The capital of France"))
    if fault == "cut":
        raise ConnectionError("cut on order")
    await anyio.sleep(30)
