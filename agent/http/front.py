"""The door of the API, plain ASGI: names the node, counts, and refuses before a body is read what need not be read.

Written as ASGI and not as framework middleware because an answer must stream through it and a client's leaving must reach the endpoint.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Collection

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.http.allowance import Allowances
from agent.http.collaborators import Limits, Services
from agent.http.errors import ApiError, answer_of, invalid, refused
from agent.http.hosts import can_be_turned, is_of_another_page
from agent.http.in_flight import InFlight, too_many
from agent.http.keys import Keys
from agent.http.metrics import Metrics
from agent.http.outcome import Outcome, answered
from agent.http.paths import FILES, INFERENCE, OPEN_WITHOUT_KEY, is_inference, is_private
from agent.mode import Refused

LOG = logging.getLogger(__name__)

DEADLINE = re.compile(r"^\d{1,6}(\.\d{1,6})?$")
FORM_BYTES = 64 << 10  # of an upload beside its file


class Front:
    """`in_flight`: all inference requests; `here`: those of them that this node answers itself."""

    def __init__(
        self,
        app: ASGIApp,
        services: Services,
        limits: Limits,
        metrics: Metrics,
        in_flight: InFlight,
        here: InFlight,
        allowances: Allowances,
    ) -> None:
        self._app = app
        self._services = services
        self._limits = limits
        self._metrics = metrics
        self._in_flight = in_flight
        self._allowances = allowances
        self._here = here

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s, status = time.monotonic(), 499  # stands where the client left before the head of the answer
        served_by = f"hotspare/{self._services.node_id}"
        note = answered(scope)
        first_s: float | None = None
        is_asked = is_inference(scope)

        async def send_named(message: Message) -> None:
            nonlocal status, first_s
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Served-By"] = served_by
                headers["X-Content-Type-Options"] = "nosniff"
                if is_asked or note.cloud_calls:
                    headers["X-Hotspare-Backend"] = note.backend
            elif first_s is None and message.get("body"):
                first_s = time.monotonic()
            await send(message)

        try:
            await self._admit(scope, receive, send_named)
        except Exception:  # the server breaks the connection off, whatever the head said
            note.has_failed = True
            raise
        finally:
            endpoint = getattr(scope.get("route"), "path", None) or (scope["path"] if scope["path"] in INFERENCE else "other")
            self._metrics.requests.labels(endpoint, _method(scope), status).inc()
            ended_s = time.monotonic()
            self._metrics.latency_s.labels(endpoint).observe(ended_s - started_s)
            if note.is_counted and status != 499:
                is_good = status < 500 and status != 429 and not note.has_failed
                first_ms = None if first_s is None else 1000 * (first_s - started_s)
                outcome = Outcome(note.backend, is_good, 1000 * (ended_s - started_s), first_ms, note.cloud_calls, note.cause)
                self._metrics.told(outcome)
                if self._services.record is not None:
                    self._services.record(outcome)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_asked = is_inference(scope)
        keys = self._services.keys()
        problem = (
            _key_problem(scope, keys)
            or _page_problem(scope, keys, self._services.names)
            or (self._gate_problem() if is_asked else None)
            or self._length_problem(scope)
            or _take_deadline(scope)
        )
        if problem:
            # A node that was not told to serve refuses by design; one that is too busy fails its clients.
            answered(scope).is_counted = is_asked and problem.status_code == 429
            await answer_of(problem, scope)(scope, receive, send)
            return
        digest = _key_digest(scope) if keys else b""
        answered(scope).key = digest.hex()
        if not keys or scope["method"] != "POST":
            await self._admitted(scope, receive, send, is_asked)
            return
        try:
            self._allowances.enter(digest, keys)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        try:
            await self._admitted(scope, receive, send, is_asked)
        finally:
            self._allowances.leave(digest, answered(scope).tokens)

    async def _admitted(self, scope: Scope, receive: Receive, send: Send, is_asked: bool) -> None:
        bounded = self._bounded(scope, receive)
        if not is_asked:
            await self._app(scope, bounded, send)
            return
        answered(scope).is_counted = True
        answered(scope).tenant = self._tenant(scope)
        self._in_flight.enter()
        self._metrics.in_flight.set(self._in_flight.count)
        try:
            await self._app(scope, bounded, send)
        finally:
            self._in_flight.leave()
            self._metrics.in_flight.set(self._in_flight.count)

    def _tenant(self, scope: Scope) -> str:
        """Who shares the models fairly: the holders of keys, or where none are asked for, addresses."""
        if key := answered(scope).key:
            return tenant_of(key)
        host, _ = scope.get("client") or ("", 0)
        return str(host)

    def _gate_problem(self) -> ApiError | None:
        answer = self._services.gate()
        if isinstance(answer, Refused):
            self._metrics.refusals.labels(answer.mode).inc()
            return refused(answer)
        elsewhere = self._in_flight.count - self._here.count
        if elsewhere >= self._limits.forwarded:
            return too_many(elsewhere, "wait for the primary or for a kept answer")
        return None

    def _length_problem(self, scope: Scope) -> ApiError | None:
        length = Headers(scope=scope).get("content-length", "0")
        limit = self._body_limit(scope)
        return too_large(limit) if length.isascii() and length.isdigit() and int(length[:20]) > limit else None

    def _body_limit(self, scope: Scope) -> int:
        if scope["path"] in FILES:
            return self._limits.upload_bytes + FORM_BYTES
        return self._limits.picture_bytes if scope["path"].endswith("/detect") else self._limits.json_bytes

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` that raises ApiError when the body is too long or too slow."""
        limit, read_bytes, is_complete = self._body_limit(scope), 0, False
        within_s = self._limits.upload_s if scope["path"] in FILES else self._limits.body_s
        ends_at_s = time.monotonic() + within_s

        async def next_message() -> Message:
            nonlocal read_bytes, is_complete
            if is_complete:
                return await receive()  # waits for the client's leaving, as long as it takes
            with anyio.move_on_after(max(0.0, ends_at_s - time.monotonic())) as slow:
                message = await receive()
            if slow.cancelled_caught:
                raise ApiError(408, f"the body did not arrive within {within_s:g} s", code="request_timeout")
            read_bytes += len(message.get("body", b""))
            if read_bytes > limit:
                raise too_large(limit)
            is_complete = not message.get("more_body", False)
            return message

        return next_message


def _take_deadline(scope: Scope) -> ApiError | None:
    """Until when the client waits, as it says in X-Request-Timeout, in seconds."""
    said = Headers(scope=scope).get("x-request-timeout")
    if said is None:
        return None
    if not DEADLINE.match(said) or float(said) <= 0:
        return invalid("X-Request-Timeout", f"X-Request-Timeout: {said[:40]!r} is no number of seconds over 0, such as 30 or 2.5")
    answered(scope).ends_s = time.monotonic() + float(said)
    return None


def _key_problem(scope: Scope, keys: Keys) -> ApiError | None:
    if not keys or scope["path"] in OPEN_WITHOUT_KEY or scope["path"].startswith("/ui/"):
        return None
    digest = _key_digest(scope)
    # Every digest is compared, so that the time taken says nothing about which one is near.
    matches = [hmac.compare_digest(digest, known) for known in keys]
    if any(matches):
        return None
    return ApiError(
        401, "this node wants an API key: send 'Authorization: Bearer <key>' or 'X-Api-Key: <key>'", type_="authentication_error",
        code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
    )  # fmt: skip


def _page_problem(scope: Scope, keys: Keys, own: Collection[str]) -> ApiError | None:
    """Pages of other sites get nothing private. With keys they have none; balancers pass any name on, so inference takes all."""
    if keys or not is_private(scope["path"]):
        return None
    headers = Headers(scope=scope)
    host = headers.get("host", "")
    if not can_be_turned(host, own) and not is_of_another_page(host, headers.get("origin")):
        return None
    return ApiError(
        403,
        f"without API keys this is for plain addresses and local names only, and for no page of another site; it came for {host[:120]!r}. "
        "Set [http] keys_file, or name it in [http] names",
        type_="permission_error",
        code="foreign_page",
    )


def _key_digest(scope: Scope) -> bytes:
    """SHA-256 of the key that came with a request: as bearer, or in X-Api-Key, as Anthropic's clients send it."""
    headers = Headers(scope=scope)
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = headers.get("x-api-key", "")
    return hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()


def tenant_of(key: str) -> str:
    """What stands for a key where it must only be told from others."""
    return key[:16]


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is over the limit of {limit} bytes; send less", code="request_too_large")


def _method(scope: Scope) -> str:
    """The method as a label: clients may send any word, a label must not take any value."""
    method: str = scope["method"]
    return method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"
