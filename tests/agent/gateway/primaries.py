"""A primary that misbehaves on order: raw bytes over a real socket, so that a test can cut, stall and garble at any place."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio.abc import SocketStream

Behaviour = Callable[["Call"], Awaitable[None]]
CHUNKED = b"transfer-encoding: chunked\r\n"
WORDS = ("The", " capital", " of", " France", " is", " Paris", ".")


@dataclass
class Call:
    """One request as it came, and the socket to answer it on."""

    path: str
    headers: dict[str, str]
    body: bytes
    socket: SocketStream

    @property
    def fields(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self.body or b"{}")
        return values

    @property
    def is_probe(self) -> bool:
        return self.path == "/v1/chat/completions" and self.fields.get("max_tokens") == 1

    async def send(self, data: bytes) -> None:
        await self.socket.send(data)

    async def answer(self, status: int, body: bytes, kind: str = "application/json", extra: str = "") -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
        await self.send(head.encode() + body)

    async def begin_stream(self) -> None:
        await self.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-request-id: cloud-1\r\n" + CHUNKED + b"\r\n")

    async def part(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def end_stream(self) -> None:
        await self.send(b"0\r\n\r\n")


def stream_bytes(words: Sequence[str] = WORDS, usage: bool = False, model: str = "cloud-1") -> list[bytes]:
    """The events of a whole streamed chat completion."""
    head = {"id": "chatcmpl-cloud", "object": "chat.completion.chunk", "created": 1700000000, "model": model, "system_fingerprint": "fp_1"}
    deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in words)]
    events: list[dict[str, Any]] = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    events.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if usage:
        events.append(
            {**head, "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}}
        )
    return [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]


def whole_bytes(words: Sequence[str] = WORDS, model: str = "cloud-1") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "".join(words)}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}
    return json.dumps(
        {"id": "chatcmpl-cloud", "object": "chat.completion", "created": 1, "model": model, "choices": [choice], "usage": usage}
    ).encode()


async def well(call: Call) -> None:
    """Answers as it should."""
    if call.path.endswith("/embeddings"):
        await call.answer(200, json.dumps({"object": "list", "data": [{"index": 0, "embedding": [0.25]}], "model": "cloud-e"}).encode())
    elif call.fields.get("stream"):
        await call.begin_stream()
        for event in stream_bytes(model=str(call.fields["model"])):
            await call.part(event)
        await call.end_stream()
    else:
        await call.answer(200, whole_bytes(model=str(call.fields["model"])))


@dataclass
class FakePrimary:
    """`behave` answers requests, `probed` probes. Both may be changed while it runs."""

    behave: Behaviour = well
    probed: Behaviour = well
    calls: list[Call] = field(default_factory=list)
    probes: int = 0
    left: anyio.Event = field(default_factory=anyio.Event)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, socket: SocketStream) -> None:
        async with socket:
            data = b""
            try:
                while True:
                    while b"\r\n\r\n" not in data:
                        data += await socket.receive()
                    head, _, data = data.partition(b"\r\n\r\n")
                    lines = head.decode().split("\r\n")
                    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
                    length = int(headers.get("content-length", 0))
                    while len(data) < length:
                        data += await socket.receive()
                    body, data = data[:length], data[length:]
                    call = Call(lines[0].split(" ")[1], headers, body, socket)
                    if call.is_probe:
                        self.probes += 1
                        await self.probed(call)
                    else:
                        self.calls.append(call)
                        await self.behave(call)
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                self.left.set()

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[FakePrimary]:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
        self.port = int(listener.extra(anyio.abc.SocketAttribute.local_port))
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, self._serve)
            yield self
            tasks.cancel_scope.cancel()


async def hang(call: Call) -> None:
    """Takes the request and says nothing, until the other side leaves."""
    await call.socket.receive()
    raise anyio.EndOfStream


async def close(call: Call) -> None:
    raise anyio.EndOfStream


async def head_then_hang(call: Call) -> None:
    await call.begin_stream()
    await hang(call)


async def comments_only(call: Call) -> None:
    await call.begin_stream()
    while True:
        await call.part(b": keep-alive\n\n")
        await anyio.sleep(0.02)


async def garbage(call: Call) -> None:
    await call.send(b"\x16\x03\x01\x00 this is no HTTP \r\n\r\n")
    raise anyio.EndOfStream


async def garbage_events(call: Call) -> None:
    await call.begin_stream()
    await call.part(b"data: <html>bad gateway</html>\n\n")
    await call.end_stream()


async def page_instead(call: Call) -> None:
    await call.answer(200, b"<html>maintenance</html>", "text/html")


async def slow_loris(call: Call) -> None:
    """One byte of the head now and then."""
    for byte in b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" * 100:
        await call.send(bytes([byte]))
        await anyio.sleep(0.05)


def status(code: int, extra: str = "") -> Behaviour:
    async def refuse(call: Call) -> None:
        await call.answer(code, b'{"error":{"message":"no","type":"t","param":null,"code":"c"}}', extra=extra)

    return refuse


def cut_at(byte: int, usage: bool = False) -> Behaviour:
    """The whole stream of events, ended by a closed connection after `byte` bytes of it."""

    async def cut(call: Call) -> None:
        await call.begin_stream()
        data = b"".join(stream_bytes(usage=usage, model=str(call.fields["model"])))[:byte]
        if data:
            await call.part(data)
        raise anyio.EndOfStream

    return cut


def stall_after(events: int) -> Behaviour:
    async def stall(call: Call) -> None:
        await call.begin_stream()
        for event in stream_bytes(model=str(call.fields["model"]))[:events]:
            await call.part(event)
        while True:
            await call.part(b": keep-alive\n\n")
            await anyio.sleep(0.02)

    return stall
