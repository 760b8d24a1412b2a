"""One request to the primary: head, events or whole body, each phase with its own deadline, every failure with its class."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx

from agent.gateway.classify import Failure, PrimaryFailed, failure_of_error, failure_of_status
from agent.gateway.classify import Kind as FailureKind
from agent.gateway.sse import Kind, Said, Splitter
from agent.protocol.wire import wire_now

MAX_WHOLE_BYTES = 64 << 20
# After [DONE] only the end of the body is left to come. Who leaves before it must close the connection, and the next request pays for a
# new one, with TLS.
LAST_BYTES_S = 0.1
# RFC 9110, 7.6.1; then what belongs to one hop because we write it anew, and what says who asks here and not there.
HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding",
    "upgrade",
})  # fmt: skip
NOT_SENT = HOP_BY_HOP | {"host", "content-length", "accept-encoding", "expect", "x-api-key", "authorization"}
NOT_RETURNED = HOP_BY_HOP | {"content-length", "server", "date", "x-served-by", "x-hotspare-backend", "x-hotspare-cache"}


@dataclass(frozen=True, slots=True)
class Budgets:
    """Seconds that each phase may take, from the request's beginning except `between_tokens_s`."""

    connect_s: float = 3.0
    first_byte_s: float = 10.0
    first_token_s: float = 10.0
    between_tokens_s: float = 15.0
    answer_s: float = 600.0

    def within(self, left_s: float) -> Budgets:
        """For a client that waits no longer: half of its time at most may pass without a token, so that this node can still answer."""
        half_s = left_s / 2
        return Budgets(
            connect_s=min(self.connect_s, half_s),
            first_byte_s=min(self.first_byte_s, half_s),
            first_token_s=min(self.first_token_s, half_s),
            between_tokens_s=self.between_tokens_s,
            answer_s=min(self.answer_s, left_s),
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for the primary as it will be sent. `fields`: its JSON, for those that are completions."""

    method: str
    path: str
    query: str
    headers: Sequence[tuple[str, str]]
    body: bytes
    fields: Mapping[str, Any]

    @property
    def wants_stream(self) -> bool:
        return bool(self.fields.get("stream"))


def headers_to_send(raw: Sequence[tuple[bytes, bytes]], key: str) -> list[tuple[str, str]]:
    """The client's headers without those of its connection. With `key`, that one speaks for all clients; else each client's own does."""
    pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in raw]
    named = {word.strip().lower() for name, value in pairs if name == "connection" for word in value.split(",")}
    own = ("authorization", "x-api-key") if not key else ()
    kept = [(name, value) for name, value in pairs if (name not in NOT_SENT or name in own) and name not in named]
    # Compressed events could not be read in passing.
    return [*kept, ("accept-encoding", "identity"), *([("authorization", f"Bearer {key}")] if key else [])]


def headers_to_return(headers: httpx.Headers) -> list[tuple[bytes, bytes]]:
    named = {word.strip().lower() for word in headers.get("connection", "").split(",")}
    return [
        (name.lower(), value)
        for name, value in headers.raw
        if (lower := name.decode("latin-1").lower()) not in NOT_RETURNED and lower not in named
    ]


class Exchange:
    """An answer that has begun. `status` and `headers` are what the client may be given."""

    def __init__(self, response: httpx.Response, budgets: Budgets, started_s: float) -> None:
        self.said = Said()
        self.status = response.status_code
        self.headers = headers_to_return(response.headers)
        self.is_stream = response.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/event-stream"
        self._response = response
        self._budgets = budgets
        self._started_s = started_s
        self._after_done: AsyncIterator[bytes] | None = None

    async def events(self) -> AsyncGenerator[Sequence[tuple[bytes, Kind]], None]:
        """Whole events with their kind, those together that came together, up to and with [DONE].

        Raises PrimaryFailed where the stream is late, broken, or ends too soon."""
        splitter, said = Splitter(), self.said
        pieces = self._response.aiter_raw()
        ends_s, token_s = self._started_s + self._budgets.answer_s, self._started_s + self._budgets.first_token_s
        has_comment = False
        while True:
            piece = await self._piece(pieces, min(ends_s, token_s), has_comment)
            if piece is None:
                raise PrimaryFailed(Failure("cut", "without [DONE]" if said.has_token else "before the first token"))
            try:
                events = splitter.feed(piece)
            except ValueError as error:
                raise PrimaryFailed(Failure("malformed", str(error))) from error
            read, failure = _read(said, events)
            has_comment = has_comment or any(kind == "comment" for _, kind in read)
            if any(kind == "token" for _, kind in read):
                token_s = anyio.current_time() + self._budgets.between_tokens_s
            if read:
                given_s = anyio.current_time()
                yield read
                token_s += anyio.current_time() - given_s  # a client that reads slowly is no fault of the primary
            if failure is not None:
                raise PrimaryFailed(failure)
            if read and read[-1][1] == "done":
                self._after_done = pieces
                return

    async def end(self) -> None:
        """Read the end of a stream that said [DONE], so that its connection serves the next request."""
        if self._after_done is None:
            return
        with anyio.move_on_after(LAST_BYTES_S, shield=True), contextlib.suppress(httpx.HTTPError):
            async for _ in self._after_done:
                return  # more than an end: who knows how much

    async def _piece(self, pieces: AsyncIterator[bytes], until_s: float, has_comment: bool) -> bytes | None:
        has_token = self.said.has_token
        try:
            with anyio.fail_after(max(0.0, until_s - anyio.current_time())):
                return await anext(pieces, None)
        except TimeoutError as error:
            if anyio.current_time() >= self._started_s + self._budgets.answer_s:
                raise PrimaryFailed(Failure("too_long", f"{self._budgets.answer_s:g} s")) from error
            if has_token:
                raise PrimaryFailed(Failure("stalled", f"{self._budgets.between_tokens_s:g} s")) from error
            kind: FailureKind = "keep_alive_only" if has_comment else "first_token_timeout"
            raise PrimaryFailed(Failure(kind, f"{self._budgets.first_token_s:g} s")) from error
        except httpx.HTTPError as error:
            raise PrimaryFailed(failure_of_error(error, has_head=True, has_token=has_token)) from error

    async def refusal(self) -> bytes:
        """The body of an answer that is no completion, which is short and there at once. Raises PrimaryFailed."""
        try:
            with anyio.fail_after(self._budgets.first_byte_s):
                return await self.whole()
        except TimeoutError as error:
            raise PrimaryFailed(Failure("first_token_timeout", f"{self._budgets.first_byte_s:g} s")) from error

    async def whole(self) -> bytes:
        """The body, complete. Raises PrimaryFailed."""
        pieces, size = [], 0
        try:
            async for piece in self._response.aiter_raw():
                pieces.append(piece)
                size += len(piece)
                if size > MAX_WHOLE_BYTES:
                    raise PrimaryFailed(Failure("malformed", f"a body of over {MAX_WHOLE_BYTES} bytes"))
        except httpx.HTTPError as error:
            raise PrimaryFailed(failure_of_error(error, has_head=True, has_token=size > 0)) from error
        return b"".join(pieces)

    async def raw(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes, for what is passed on without being understood. Raises PrimaryFailed."""
        pieces = self._response.aiter_raw()
        try:
            while True:
                with anyio.fail_after(self._budgets.answer_s):
                    piece = await anext(pieces, None)
                if piece is None:
                    return
                yield piece
        except TimeoutError as error:
            raise PrimaryFailed(Failure("stalled", f"{self._budgets.answer_s:g} s")) from error
        except httpx.HTTPError as error:
            raise PrimaryFailed(failure_of_error(error, has_head=True, has_token=True)) from error


def _read(said: Said, events: Sequence[bytes]) -> tuple[list[tuple[bytes, Kind]], Failure | None]:
    """Events with their kind up to [DONE], or up to one that says that the answer failed."""
    read: list[tuple[bytes, Kind]] = []
    for event in events:
        kind, words = said.read(event)
        if kind in ("error", "malformed"):
            return read, Failure("server_error" if kind == "error" else "malformed", words)
        read.append((event, kind))
        if kind == "done":
            break
    return read, None


@asynccontextmanager
async def exchange(
    client: httpx.AsyncClient, url: str, asked: Asked, budgets: Budgets, key_is_ours: bool, first_byte_s: float | None
) -> AsyncIterator[Exchange]:
    """Ask the primary. Raises PrimaryFailed unless its head is one that a client may see. `first_byte_s` None: as long as it takes."""
    started_s = anyio.current_time()
    timeout = httpx.Timeout(None, connect=budgets.connect_s, pool=budgets.connect_s, write=budgets.first_byte_s)
    # Never a string put together by hand: the client's path must not become another host.
    target = httpx.URL(url.rstrip("/") + asked.path).copy_with(query=asked.query.encode() or None)
    request = client.build_request(asked.method, target, content=asked.body, headers=list(asked.headers), timeout=timeout)
    try:
        with anyio.fail_after(first_byte_s):
            response = await client.send(request, stream=True)
    except TimeoutError as error:
        raise PrimaryFailed(Failure("first_byte_timeout", f"{first_byte_s:g} s")) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise PrimaryFailed(failure_of_error(error, has_head=False, has_token=False)) from error
    try:
        if failure := failure_of_status(response.status_code, response.headers, key_is_ours, wire_now()):
            raise PrimaryFailed(failure)
        is_json = "json" in response.headers.get("content-type", "")
        if response.status_code in (404, 405) and asked.path.endswith("/responses"):  # DeepSeek has no such thing, and is well all the same
            raise PrimaryFailed(Failure("malformed", f"HTTP {response.status_code}: it has no {asked.path}", weight=0.0))
        if response.status_code in (404, 405) and not is_json:  # a balancer without the service behind it answers so
            raise PrimaryFailed(Failure("malformed", f"HTTP {response.status_code} that is not the API's"))
        begun = Exchange(response, budgets, started_s)
        yield begun
        await begun.end()
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(1.0):
            await response.aclose()
