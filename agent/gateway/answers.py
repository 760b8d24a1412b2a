"""The answer cache: the same request gets the same answer again, and equal requests in flight are asked once. ASGI, outside the gateway."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.gateway.cache_key import key_of, may_keep, tenant_of
from agent.gateway.flight import Flight, fly
from agent.gateway.kept import Kept, given, kept_of
from agent.gateway.route import ANSWERED, fields_of
from agent.gateway.visit import ClientGone, read_body
from agent.http.errors import ApiError
from agent.http.outcome import Answered, answered

Asked = Literal["hit", "miss", "shared"]
HEADER = "X-Hotspare-Cache"
LONGEST_KEPT = 4 << 20


class AnswerStore(Protocol):
    """Neither method raises; both have a deadline of their own."""

    async def get(self, key: str) -> bytes | None: ...

    async def put(self, key: str, answer: bytes, ttl_s: float) -> None: ...


class Origins(Protocol):
    """Who answers a request, so that answers of different models never stand for each other."""

    def asked(self, model: str) -> Sequence[str]:
        """Whose kept answers count now, the best first; empty: nobody's."""

    def of(self, model: str, is_primary: bool) -> str | None: ...


@dataclass(frozen=True, slots=True)
class CachePolicy:
    ttl_s: float = 3600.0
    keeps_all: bool = False
    is_shared: bool = False


@dataclass
class Counts:
    """Since the start. `shared`: answered by another request that was in flight."""

    hits: int = 0
    misses: int = 0
    shared: int = 0
    kept: int = 0


class AnswerCache:
    def __init__(self, app: ASGIApp, store: AnswerStore, policy: CachePolicy, origins: Origins, clock: Callable[[], float]) -> None:
        self._app = app
        self._store = store
        self._policy = policy
        self._origins = origins
        self._clock = clock
        self._flights: dict[tuple[str, bool, bool], Flight] = {}
        self.counts = Counts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in ANSWERED:
            await self._app(scope, receive, send)
            return
        try:
            body = await read_body(receive)
        except ClientGone:
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        fields = fields_of(body)
        origins = self._origins.asked(str(fields.get("model", ""))) if may_keep(scope["path"], fields, self._policy.keeps_all) else ()
        headers = Headers(scope=scope)
        wishes = {word.strip().lower() for word in headers.get("cache-control", "").split(",")}
        if not origins or "no-store" in wishes:
            await self._app(scope, replayed(body, receive), send)
            return
        key = self._key(scope, headers, fields)
        if "no-cache" not in wishes and await self._give(key, origins, fields, scope, send):
            return
        await self._share(key, origins[0], fields, body, scope, receive, send)

    def _key(self, scope: Scope, headers: Headers, fields: Mapping[str, Any]) -> Callable[[str], str]:
        tenant = tenant_of(headers.get("authorization", "") + headers.get("x-api-key", ""), self._policy.is_shared)
        query = scope.get("query_string", b"").decode("latin-1")
        return lambda origin: key_of(origin, tenant, scope["path"], query, fields)

    async def _give(self, key: Callable[[str], str], origins: Sequence[str], fields: Mapping[str, Any], scope: Scope, send: Send) -> bool:
        """Answer with what is kept; whether there was anything."""
        wants_stream, wants_usage = _form(fields)
        for origin in origins:
            data = await self._store.get(key(origin))
            kept = Kept.unpacked(data) if data is not None else None
            body = given(kept, wants_stream, wants_usage) if kept is not None else None
            if kept is None or body is None:
                continue
            age_s = self._clock() - kept.made_s
            if not -60.0 <= age_s <= self._policy.ttl_s:  # the clock was wrong then, or is now
                continue
            self.counts.hits += 1
            answered(scope).backend = "cache"
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8" if wants_stream else b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"cache-control", b"no-store"),
                (b"age", b"%d" % max(0.0, age_s)),
                (HEADER.lower().encode(), b"hit"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return True
        return False

    async def _share(
        self, key: Callable[[str], str], origin: str, fields: Mapping[str, Any], body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> None:
        name = (key(origin), *_form(fields))
        note = answered(scope)
        flight = self._flights.get(name)
        is_joined = flight is not None and flight.is_joinable
        if flight is not None and is_joined and await _follow(flight, receive, partial(_marked, send, "shared", note, flight.note)):
            self.counts.shared += 1
            note.has_failed = flight.note.has_failed
            return
        self.counts.misses += 1
        flight = self._flights[name] = Flight(note)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_follow, flight, receive, partial(_marked, send, "miss", note, note))
                await fly(flight, partial(self._app, scope, flight.receive(body), flight.put))
                self._drop(name, flight)
                await self._keep(key, fields, flight)
        finally:
            self._drop(name, flight)

    def _drop(self, name: tuple[str, bool, bool], flight: Flight) -> None:
        if self._flights.get(name) is flight:
            del self._flights[name]

    async def _keep(self, key: Callable[[str], str], fields: Mapping[str, Any], flight: Flight) -> None:
        """Only what is whole, and of one origin: an answer that two models wrote is neither's."""
        note, (status, body) = flight.note, flight.answer()
        if status != 200 or note.has_failed or note.backend not in ("primary", "local") or len(body) > LONGEST_KEPT:
            return
        origin = self._origins.of(str(fields.get("model", "")), note.backend == "primary")
        kept = kept_of(body, _form(fields)[0], self._clock()) if origin is not None else None
        if origin is not None and kept is not None:
            self.counts.kept += 1
            await self._store.put(key(origin), kept.packed(), self._policy.ttl_s)


async def _follow(flight: Flight, receive: Receive, send: Send) -> bool:
    """Give a flight's answer to one client until it leaves; False where there was no answer."""
    is_given = True
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        is_given = await flight.read(send)
        tasks.cancel_scope.cancel()
    return is_given


async def _marked(send: Send, asked: Asked, note: Answered, of: Answered, message: Message) -> None:
    """`send` that says in the head how the cache was of use. Messages are shared between readers, so the head is a new one."""
    if message["type"] == "http.response.start":
        message = {**message, "headers": list(message.get("headers", []))}
        MutableHeaders(scope=message)[HEADER] = asked
        note.backend, note.cause = of.backend, of.cause
    await send(message)


def replayed(body: bytes, receive: Receive) -> Receive:
    has_body = False

    async def next_message() -> Message:
        nonlocal has_body
        if has_body:
            return await receive()
        has_body = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


def _form(fields: Mapping[str, Any]) -> tuple[bool, bool]:
    """(as events, with usage at the end)"""
    options = fields.get("stream_options")
    return bool(fields.get("stream")), isinstance(options, dict) and bool(options.get("include_usage"))
