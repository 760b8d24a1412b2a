"""The gateway and the answer cache of one node, put together from its configuration; agent/main.py starts them."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from agent.config import CacheSettings, ConfigurationError, Settings
from agent.gateway.answers import AnswerCache, CachePolicy
from agent.gateway.answers_redis import RedisAnswers
from agent.gateway.answers_sqlite import SqliteAnswers
from agent.gateway.breaker import Breaker, BreakerPolicy, Closed, RetryBudget
from agent.gateway.forward import Budgets
from agent.gateway.gateway import Gateway, GatewayPolicy
from agent.gateway.keys import KeyFile
from agent.gateway.primary import Primary
from agent.gateway.probe import Probe, probe_primary
from agent.gateway.sla import SlaRecord
from agent.http.collaborators import Gate, Meant, ServiceFailure, Services, TextService
from agent.http.context import now_s
from agent.mode import Allowed, Refused
from agent.protocol.wire import Severity
from agent.served import ServedModels

logger = logging.getLogger(__name__)

MORE_CONNECTIONS = 64  # than requests may be forwarded: for probes, and for paths that are passed on without being counted


class OwnNames:
    """A manifest's own name, with an adapter or not, means this node's model and no other; an alias stands for the primary's model too."""

    def __init__(self, served: ServedModels) -> None:
        self._served = served

    def is_own(self, name: str) -> bool:
        return self._served.is_own(name)

    def is_known(self, name: str) -> bool:
        return self._served.is_own(self.meant(name).model)

    def meant(self, name: str) -> Meant:
        return self._served.meant(name)

    def engine(self, name: str) -> str | None:
        """The engine that answers a name now, precisely; None: none does."""
        try:
            meant = self.meant(name)
            served = self._served.resolve(meant.model)
        except ServiceFailure:
            return None
        return f"local:{served.manifest.name}:{served.folder.name}:{meant.adapter}:{meant.thinking}"


class AnswerOrigins:
    """Whose kept answers count: the primary's while it answers, and then too, for they are the better ones, before this node's own."""

    def __init__(self, names: OwnNames, primary: Primary | None, url: str) -> None:
        self._names = names
        self._primary = primary
        self._url = url

    def asked(self, model: str) -> Sequence[str]:
        cloud = None if self._primary is None or self._names.is_own(model) else self.of(model, is_primary=True)
        if cloud is not None and self._primary is not None and self._primary.may_ask():
            return [cloud]
        return [origin for origin in (cloud, self.of(model, is_primary=False)) if origin is not None]

    def of(self, model: str, is_primary: bool) -> str | None:
        return f"primary:{self._url}" if is_primary else self._names.engine(model)


class GatewaySide:
    """`before` puts answer cache and gateway before the endpoints of a node; `parts` run beside its server."""

    def __init__(self, node: Settings, text: TextService, served: ServedModels, tell: Callable[[Severity, str], None]) -> None:
        settings = node.gateway
        self._settings = settings
        self._text = text
        self._names = OwnNames(served)
        self._cache = node.cache
        self._store = _store(node.cache, node.node.state) if node.cache.ttl_s else None
        self._tell = tell
        self._key = KeyFile(settings.key_file).key
        connections = node.http.forwarded + MORE_CONNECTIONS
        self._client = httpx.AsyncClient(
            trust_env=False, limits=httpx.Limits(max_connections=connections, max_keepalive_connections=32, keepalive_expiry=30.0)
        )
        self.answers: AnswerCache | None = None
        self._sla = SlaRecord(node.node.state / "sla.sqlite", now_s, self._standing)
        self.primary = Primary(
            self._probe,
            BreakerPolicy(),
            RetryBudget(share=settings.retry_share),
            settings.probe_s,
            settings.key_file is not None,
            self._changed,
        )

    @property
    def is_on(self) -> bool:
        return bool(self._settings.primary)

    def _around(self, app: ASGIApp) -> ASGIApp:
        return self._cached(self._gateway(app))

    def _cached(self, app: ASGIApp) -> ASGIApp:
        one = self._cache
        if self._store is None:
            return app
        origins = AnswerOrigins(self._names, self.primary if self.is_on else None, self._settings.primary.rstrip("/"))
        self.answers = AnswerCache(app, self._store, CachePolicy(one.ttl_s, one.keeps_all, one.is_shared), origins, now_s)
        return self.answers

    def _gateway(self, app: ASGIApp) -> ASGIApp:
        if not self.is_on:
            return app
        one = self._settings
        budgets = Budgets(one.connect_s, one.first_byte_s, one.first_token_s, one.between_tokens_s, one.answer_s)
        policy = GatewayPolicy(one.primary.rstrip("/"), budgets, one.rename, one.hedge_s, one.continues)
        return Gateway(app, self._client, self.primary, policy, self._text, self._names, self._key)

    def before(self, services: Services) -> Services:
        """The services of a node with what this side adds to them."""
        gate = self._gate(services.gate)
        return replace(services, gate=gate, around=self._around, record=self._sla.told, sla=self._sla.report)

    def _gate(self, node: Gate) -> Gate:
        """A gateway's clients are its own and need no lease from a coordinator; only a node that ends refuses them."""

        def gate() -> Allowed | Refused:
            answer = node()
            return Allowed() if self.is_on and isinstance(answer, Refused) and answer.mode != "draining" else answer

        return gate

    def parts(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        return [self._sla.run, *([self._run] if self.is_on else []), *([self._store.run] if self._store else [])]

    async def _run(self) -> None:
        async with self._client:
            await self.primary.run()

    def _probe(self) -> Awaitable[Probe]:
        one = self._settings
        return probe_primary(self._client, one.primary, one.rename.get(one.model, one.model), self._key(), one.probe_timeout_s)

    def _standing(self) -> dict[str, Any] | None:
        """Of the primary; None: this node is no gateway."""
        if not self.is_on:
            return None
        one = self.primary.standing()
        counts = asdict(self.answers.counts) if self.answers else None
        since_s = max(0.0, time.monotonic() - one.since_s)
        return {"state": one.state, "since_s": since_s, "cause": one.cause, "retry_s": one.retry_s, "cache": counts}

    def _changed(self, before: Breaker, after: Breaker) -> None:
        if isinstance(after, Closed):
            self._tell("info", "the primary answers again, and requests go to it")
        elif isinstance(before, Closed):
            self._tell("warning", f"requests are answered here: {self.primary.standing().cause}")


def _store(settings: CacheSettings, state: Path) -> RedisAnswers | SqliteAnswers:
    """Raises ConfigurationError for a URL in a file that is none."""
    url = settings.url
    if settings.url_file is not None:
        url = settings.url_file.read_text().strip()
    if url:
        try:
            return RedisAnswers(url, settings.deadline_ms / 1000)
        except ValueError as error:
            raise ConfigurationError(f"cache.url: {error}") from error
    return SqliteAnswers(state / "answers.sqlite", int(settings.budget_mb * (1 << 20)), settings.entries, now_s)
