"""A node's HTTP side with a gateway over a fake text service, and a primary that misbehaves on order; all over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import anyio
import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from agent.gateway.breaker import BreakerPolicy, RetryBudget
from agent.gateway.forward import Budgets
from agent.gateway.gateway import Gateway, GatewayPolicy
from agent.gateway.primary import Primary
from agent.gateway.probe import probe_primary
from agent.gateway.sla import SlaRecord
from agent.http.app import create_app
from agent.http.collaborators import Limits, Meant, Sampling, Services, TextDelta, Usage, split_name
from agent.http.keys import KeyRules
from agent.http.outcome import Outcome
from agent.http.server import HttpServer, bind
from tests.agent.gateway.primaries import FakePrimary
from tests.agent.http.fakes import Eyes, Node, Parrot

QUICK = Budgets(connect_s=1.0, first_byte_s=0.3, first_token_s=0.3, between_tokens_s=0.3, answer_s=5.0)
LOCAL = ("One", " two", " three", " four.")


@dataclass
class Speaker(Parrot):
    """Says the same every time; a begun answer is gone on with after as many words as it has. `begun`: what it was given to go on with."""

    begun: str | None = None
    asked: int = 0
    words: tuple[str, ...] = LOCAL

    def chat_prompt(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
    ) -> list[int]:
        self.told = {"messages": messages, "tools": tools, "thinking": thinking}
        return [1, 2, 3]

    def encode(self, model: str, text: str) -> list[int]:
        return list(text.encode())

    def continued_prompt(self, model: str, messages: Sequence[Mapping[str, Any]], said: str) -> tuple[list[int], int]:
        self.begun, self.told = said, {"messages": messages}
        words = len(said.split())
        return [1, 2, 3] + [7] * words, words

    async def generate(
        self, model: str, prompt_tokens: Sequence[int], sampling: Sampling, continues: bool = False
    ) -> AsyncIterator[TextDelta]:
        self.asked, self.last = self.asked + 1, sampling
        if self.failure:
            raise self.failure
        words = tuple(f" <{index}>" for index in range(3)) if continues else self.words
        said = words[: sampling.max_tokens]
        for word in said:
            yield TextDelta(word)
            await anyio.sleep(self.pace_s)
        yield TextDelta("", (), "stop" if said == words else "length", Usage(len(prompt_tokens), len(said)))


@dataclass
class Names:
    own: tuple[str, ...] = ("parrot", "letters")
    aliases: tuple[str, ...] = ("deepseek-chat",)

    def is_own(self, name: str) -> bool:
        return name in self.own

    def is_known(self, name: str) -> bool:
        return name in (*self.own, *self.aliases)

    def meant(self, name: str) -> Meant:
        return split_name(name)


@dataclass
class Setup:
    """Change it, then `async with setup.running()`. `around` puts more layers outside the gateway."""

    cloud: FakePrimary = field(default_factory=FakePrimary)
    text: Speaker = field(default_factory=Speaker)
    policy: GatewayPolicy = field(default_factory=lambda: GatewayPolicy("", QUICK))
    breaker: BreakerPolicy = field(default_factory=lambda: BreakerPolicy(first_pause_s=0.2, longest_pause_s=0.4, pass_gap_s=0.05))
    retries: RetryBudget = field(default_factory=RetryBudget)
    probe_timeout_s: float = 0.3
    interval_s: float = 30.0
    key: str = "cloud-key"
    url: str | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    around: Callable[[ASGIApp, Primary], ASGIApp] = lambda app, primary: app
    keys: dict[bytes, KeyRules] = field(default_factory=dict)
    sla: SlaRecord | None = None
    limits: Limits = field(default_factory=lambda: Limits(in_flight=512))

    def record(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if self.sla is not None:
            self.sla.told(outcome)

    @asynccontextmanager
    async def running(self, probes: bool = True) -> AsyncIterator[House]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.cloud.running())
            url = self.url or self.cloud.url
            client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
            primary = Primary(
                partial(probe_primary, client, url, "cloud-1", self.key, self.probe_timeout_s),
                self.breaker,
                self.retries,
                self.interval_s,
                bool(self.key),
                lambda before, after: self.states.append(type(after).__name__),
            )
            policy = replace(self.policy, url=url)

            def around(app: ASGIApp) -> ASGIApp:
                return self.around(Gateway(app, client, primary, policy, self.text, Names(), lambda: self.key), primary)

            node = Node()
            services = Services(
                "spare-1", node, node.gate, self.text, Eyes(), keys=lambda: self.keys, around=around, record=self.record,
                sla=self.sla.report if self.sla else None,
            )  # fmt: skip
            app = create_app(services, CollectorRegistry(), self.limits)
            server = HttpServer(app.asgi, bind("127.0.0.1", 0), Limits(), stop_s=1, closing=app.closing)
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            if probes:
                tasks.start_soon(primary.run)
            tasks.start_soon(server.run)
            await server.started.wait()
            local = await stack.enter_async_context(httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30.0))
            cloud = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="client-key", max_retries=0, timeout=30.0)
            await stack.enter_async_context(cloud)
            yield House(self, local, cloud, primary)


@dataclass
class House:
    setup: Setup
    client: httpx.AsyncClient
    openai: openai.AsyncOpenAI
    primary: Primary


@pytest.fixture
def setup() -> Setup:
    return Setup()
