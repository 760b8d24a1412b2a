"""The gateway: a completion goes to the primary while that is well, and is answered here when it is not. The one place with effects."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import anyio
import httpx
from anyio.abc import TaskGroup
from starlette.types import ASGIApp, Receive, Scope, Send

from agent.errors import AgentError
from agent.gateway.classify import Failure, PrimaryFailed
from agent.gateway.continuation import CannotContinue, Continuation, as_api_error, interrupted, why_not
from agent.gateway.fallback import honest, unavailable
from agent.gateway.forward import Asked, Budgets, Exchange, exchange
from agent.gateway.primary import Primary
from agent.gateway.route import ANSWERED, destination, fields_of, to_client, to_primary
from agent.gateway.sse import Kind, Said
from agent.gateway.visit import ClientGone, LocalRun, Visit, read_body
from agent.gateway.whole import check_whole, unless_suspect
from agent.http.collaborators import Meant, TextService
from agent.http.errors import ApiError
from agent.http.generation import Caller
from agent.http.outcome import Answered, answered
from agent.http.streams import event

RETRY_PAUSE_S = 0.2
EARLY_HEAD_S = 10.0  # as long as this node holds the head of its own streams back
KEEP_ALIVE_S = 10.0
SLOWER_THAN_THE_HEDGE = 0.5
SLOW = frozenset({"connect_timeout", "first_byte_timeout", "first_token_timeout", "keep_alive_only", "too_long"})
BYTES_A_TOKEN = 4  # of a request whose stream tells no usage


class Names(Protocol):
    """Which model names this node knows: `is_own` for those that mean a model of this node and no other, `is_known` with aliases too.
    `meant`: what it takes a name for."""

    def is_own(self, name: str) -> bool: ...

    def is_known(self, name: str) -> bool: ...

    def meant(self, name: str) -> Meant: ...


@dataclass(frozen=True, slots=True)
class GatewayPolicy:
    """`url`: the primary's, without /v1. `rename`: a client's name of a model → the primary's. `hedge_s` 0: never ask both."""

    url: str
    budgets: Budgets = field(default_factory=Budgets)
    rename: Mapping[str, str] = field(default_factory=dict)
    hedge_s: float = 0.0
    continues: bool = True


@dataclass(frozen=True, slots=True)
class Begun:
    """An answer of the primary that may be given: its whole `body`, or the events up to the first token and the rest of them."""

    exchange: Exchange
    body: bytes | None = None
    pending: tuple[bytes, ...] = ()
    rest: AsyncGenerator[Sequence[tuple[bytes, Kind]], None] | None = None


class Gateway:
    """ASGI. `local` answers what the primary does not; `key` gives this node's key for the primary, "" lets each client's own pass."""

    def __init__(
        self,
        local: ASGIApp,
        client: httpx.AsyncClient,
        primary: Primary,
        policy: GatewayPolicy,
        text: TextService,
        names: Names,
        key: Callable[[], str],
    ) -> None:
        self._local = local
        self._client = client
        self._primary = primary
        self._policy = policy
        self._text = text
        self._names = names
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        where = destination(scope["method"], scope["path"]) if scope["type"] == "http" else "here"
        if where == "here":
            await self._local(scope, receive, send)
            return
        try:
            visit = Visit(scope, receive, send, await read_body(receive))
        except ClientGone:
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(visit.watch)
            if where == "passed":
                await self._pass_on(visit)
            else:
                await self._answer(visit, tasks)
            tasks.cancel_scope.cancel()

    # ── completions ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _answer(self, visit: Visit, tasks: TaskGroup) -> None:
        fields = fields_of(visit.body)
        name = str(fields.get("model", ""))
        if not fields or self._names.is_own(name):
            await self._local(visit.scope, visit.receive(), visit.send)
            return
        note = answered(visit.scope)
        if not self._primary.may_ask():
            note.cause = "open"
            await self._stand_in(visit, fields, self._primary.standing().cause)
            return
        failure: Failure | None = None
        with visit.present:
            async with AsyncExitStack() as stack:
                try:
                    first = await self._first(self._asked(visit, fields), note, visit, stack, tasks)
                except PrimaryFailed as failed:
                    failure = failed.failure
                else:
                    await self._deliver(first, fields, visit, note, stack)
        if failure is not None:
            note.cause = failure.kind
            await self._stand_in(visit, fields, failure.words)

    async def _stand_in(self, visit: Visit, fields: Mapping[str, Any], cause: str) -> None:
        def retry_s() -> float:
            return self._primary.standing().retry_s

        name = str(fields.get("model", ""))
        if ANSWERED[visit.scope["path"]] == "data" and not self._names.is_known(name):
            # Vectors of another model cannot be compared with the primary's: a silent stand-in would spoil the client's index.
            problem = unavailable(f"it has no model {name[:100]!r} for embeddings", cause, retry_s())
            await problem.response()(visit.scope, visit.receive(), visit.send)
            return
        await self._local(visit.scope, visit.receive(), honest(visit.scope, visit.receive(), visit.send, cause, retry_s))

    async def _first(self, asked: Asked, note: Answered, visit: Visit, stack: AsyncExitStack, tasks: TaskGroup) -> Begun | LocalRun:
        """Whoever has the first token. Raises PrimaryFailed where the primary has none and the local model was not asked yet."""
        if not self._policy.hedge_s:
            return await self._begin(asked, note, stack)
        begun: Begun | None = None
        failure: Failure | None = None
        moved = anyio.Event()

        async def ask() -> None:
            nonlocal begun, failure
            try:
                begun = await self._begin(asked, note, stack)
            except PrimaryFailed as failed:
                failure = failed.failure
            moved.set()

        run: LocalRun | None = None
        async with anyio.create_task_group() as race:
            race.start_soon(ask)
            with anyio.move_on_after(self._policy.hedge_s):
                await moved.wait()
            if begun is None and failure is None:
                run = LocalRun(self._local, visit, moved.set)
                tasks.start_soon(run.run)
                await moved.wait()
            race.cancel_scope.cancel()
        if begun is not None:
            if run is not None:
                run.cancel()
            return begun
        if run is None:
            raise PrimaryFailed(failure or Failure("closed"))
        if failure is None:
            self._primary.failed(Failure("first_token_timeout", "slower than this node", weight=SLOWER_THAN_THE_HEDGE))
        note.cause = failure.kind if failure else "slower"
        return run

    async def _begin(self, asked: Asked, note: Answered, stack: AsyncExitStack) -> Begun:
        """The primary's answer up to its first token; once more where it failed at once and the budget of retries allows."""
        self._primary.asked()
        usual, is_second = self._policy.budgets, False
        budgets = usual.within(note.left_s(usual.answer_s)) if note.ends_s < math.inf else usual
        while True:
            note.cloud_calls += 1
            try:
                begun = await (self._begin_stream(asked, budgets, stack) if asked.wants_stream else self._whole(asked, budgets))
            except PrimaryFailed as failed:
                failure = failed.failure
                if failure.kind in SLOW and budgets != usual:
                    failure = replace(failure, weight=0.0)  # it was this client who could not wait
                self._primary.failed(failure)
                is_worth_it = failure.facts.is_quick and failure.weight and not failure.retry_after_s
                if is_second or not is_worth_it or not self._primary.may_retry():
                    raise
                is_second = True
                await anyio.sleep(random.random() * RETRY_PAUSE_S)
                continue
            if begun.body is not None:
                self._primary.succeeded()
            return begun

    async def _begin_stream(self, asked: Asked, budgets: Budgets, stack: AsyncExitStack) -> Begun:
        begun_s = anyio.current_time()
        # Its own stack: an attempt that fails, or loses a race, must not stay connected and be paid for while another answers.
        async with AsyncExitStack() as attempt:
            head = await attempt.enter_async_context(
                exchange(self._client, self._policy.url, asked, budgets, bool(self._key()), budgets.first_byte_s)
            )
            if head.status >= 400:
                return Begun(head, await head.refusal())
            if not head.is_stream:
                raise PrimaryFailed(Failure("malformed", "no event stream"))
            rest = await attempt.enter_async_context(aclosing(head.events()))
            pending: list[bytes] = []
            async for items in rest:
                pending += [item for item, _ in items]
                kinds = {kind for _, kind in items}
                if "done" in kinds and not head.said.has_token:
                    raise PrimaryFailed(Failure("malformed", "[DONE] without a token"))
                # Comments must reach the client before it loses patience; from here on a failure is answered inside the stream.
                if kinds & {"token", "done"} or anyio.current_time() - begun_s > EARLY_HEAD_S:
                    break
            stack.push_async_exit(attempt.pop_all())
        return Begun(head, pending=tuple(pending), rest=rest)

    async def _whole(self, asked: Asked, budgets: Budgets) -> Begun:
        async def wait() -> Begun:
            async with exchange(self._client, self._policy.url, asked, budgets, bool(self._key()), None) as head:
                return Begun(head, await head.whole())

        begun = await unless_suspect(wait, self._primary.suspected, budgets.first_token_s, budgets.answer_s)
        if begun.exchange.status == 200:
            begun.exchange.said.tokens = check_whole(begun.body or b"", ANSWERED[asked.path])
        return begun

    async def _deliver(
        self, first: Begun | LocalRun, fields: Mapping[str, Any], visit: Visit, note: Answered, stack: AsyncExitStack
    ) -> None:
        if isinstance(first, LocalRun):
            await first.deliver()
            return
        note.backend = "primary"
        named = to_client(fields, self._policy.rename)
        headers = first.exchange.headers
        if first.body is not None:
            body = named(first.body)
            headers = [*headers, (b"content-length", str(len(body)).encode())]
            note.tokens += first.exchange.said.tokens
            await visit.send({"type": "http.response.start", "status": first.exchange.status, "headers": headers})
            await visit.send({"type": "http.response.body", "body": body})
            return
        await visit.send({"type": "http.response.start", "status": 200, "headers": [*headers, (b"x-accel-buffering", b"no")]})
        await visit.send(_part(b"".join(map(named, first.pending))))
        try:
            if first.rest is not None:
                async for items in first.rest:
                    await visit.send(_part(b"".join(named(item) for item, _ in items)))
            self._primary.succeeded()
        except PrimaryFailed as failed:
            self._primary.failed(failed.failure)
            await stack.aclose()  # one that stalls would go on, and be paid for
            await self._go_on(fields, first.exchange.said, failed.failure, visit, note)
        finally:
            said = first.exchange.said
            note.tokens += said.tokens or len(visit.body) // BYTES_A_TOKEN + said.pieces
        await visit.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _go_on(self, fields: Mapping[str, Any], said: Said, failure: Failure, visit: Visit, note: Answered) -> None:
        """Finish a stream that the primary began: by the local model, or by an error event that says why not."""
        note.cause = failure.kind
        if said.finish is None:
            why = why_not(fields, said) if self._policy.continues else "this node is set not to go on with it"
            if why:
                note.has_failed = True
                await visit.send(_part(event(interrupted(failure, why).body())))
                return
            note.backend = "continued"
        if said.head:
            said.head["model"] = fields.get("model")
        outbox, inbox = anyio.create_memory_object_stream[bytes](16)

        async def produce() -> None:
            async with outbox:
                try:
                    going_on = Continuation(self._text, fields, said, failure, self._names.meant(str(fields.get("model"))), Caller(note))
                    async with aclosing(going_on.events()) as items:
                        async for item in items:
                            await outbox.send(item)
                except (CannotContinue, AgentError) as error:
                    note.has_failed = True
                    await outbox.send(event(as_api_error(error, failure).body()))

        async with inbox, anyio.create_task_group() as tasks:
            tasks.start_soon(produce)
            while True:
                item = b": keep-alive\n\n"
                try:
                    with anyio.move_on_after(KEEP_ALIVE_S):
                        item = await inbox.receive()
                except anyio.EndOfStream:
                    return
                await visit.send(_part(item))

    def _asked(self, visit: Visit, fields: Mapping[str, Any]) -> Asked:
        return to_primary(visit.scope, visit.body, fields, self._key(), self._policy.rename)

    # ── everything else of the primary ────────────────────────────────────────────────────────────────────────────────────────────

    async def _pass_on(self, visit: Visit) -> None:
        """A path that only the primary has: bytes there, bytes back, nothing to fall back on."""
        standing = self._primary.standing()
        has_head, only = False, f"only the primary serves {visit.scope['path']}"
        with visit.present:
            try:
                if not self._primary.may_ask():
                    raise unavailable(only, standing.cause, standing.retry_s)
                asked, budgets = self._asked(visit, {}), self._policy.budgets
                async with exchange(self._client, self._policy.url, asked, budgets, bool(self._key()), budgets.answer_s) as head:
                    note = answered(visit.scope)
                    note.backend, note.cloud_calls = "primary", 1
                    await visit.send({"type": "http.response.start", "status": head.status, "headers": head.headers})
                    has_head = True
                    async with aclosing(head.raw()) as pieces:
                        async for piece in pieces:
                            await visit.send(_part(piece))
                    await visit.send({"type": "http.response.body", "body": b"", "more_body": False})
            except (PrimaryFailed, ApiError) as error:
                if has_head:
                    return  # the server breaks the connection off: the only honest end of a body without a length
                problem = error if isinstance(error, ApiError) else unavailable(only, str(error), 1)
                await problem.response()(visit.scope, visit.receive(), visit.send)


def _part(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}
