"""The primary as this node sees it: the breaker's state, moved by requests and by probes. The one place that holds it."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio

from agent.gateway.breaker import Breaker, BreakerPolicy, Closed, HalfOpen, Open, RetryBudget, failed, next_look_s, succeeded, tick
from agent.gateway.classify import Failure
from agent.gateway.probe import Probe

logger = logging.getLogger(__name__)

FRESH_S = 2.0  # a probe's answer serves all who are in doubt within this time


@dataclass(frozen=True, slots=True)
class Standing:
    """What people and metrics are told. `since_s`: of this state, on the monotonic clock."""

    state: str
    since_s: float
    cause: str = ""
    retry_s: float = 0.0


class Primary:
    """`probe` asks for one token. `on_change(before, after)` is told when requests begin or cease to go to the primary, with its state."""

    def __init__(
        self,
        probe: Callable[[], Awaitable[Probe]],
        policy: BreakerPolicy,
        retries: RetryBudget,
        interval_s: float,
        key_is_ours: bool,
        on_change: Callable[[Breaker, Breaker], None] = lambda before, after: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe = probe
        self._policy = policy
        self._retries = retries
        self._interval_s = interval_s
        self._key_is_ours = key_is_ours
        self._on_change = on_change
        self._clock = clock
        self._state: Breaker = Closed(since_s=clock())
        self._evidence_s = float("-inf")
        self._moved = anyio.Event()
        self._asking: anyio.Event | None = None
        self._doubt: Failure | None = None

    @property
    def state(self) -> Breaker:
        return self._state

    def standing(self) -> Standing:
        match self._state:
            case Closed(since_s=since_s):
                return Standing("closed", since_s)
            case Open(since_s=since_s, until_s=until_s, cause=cause):
                return Standing("open", since_s, cause.words, max(0.0, until_s - self._clock()))
            case HalfOpen(since_s=since_s, cause=cause):
                return Standing("half_open", since_s, cause.words, self._policy.pass_gap_s)

    def may_ask(self) -> bool:
        """Whether a client's request goes to the primary now."""
        return isinstance(self._state, Closed)

    def asked(self) -> None:
        self._retries = self._retries.asked()

    def may_retry(self) -> bool:
        """Take one second attempt out of the budget, if the primary is still asked at all."""
        left = self._retries.spent() if self.may_ask() else None
        self._retries = left or self._retries
        return left is not None

    def succeeded(self, by_probe: bool = False) -> None:
        if by_probe or isinstance(self._state, Closed):
            self._evidence_s = self._clock()
        self._move(succeeded(self._state, self._clock(), self._policy, by_probe))

    def failed(self, failure: Failure, by_probe: bool = False) -> None:
        self._move(failed(self._state, failure, self._clock(), self._policy, random.random(), by_probe))

    async def suspected(self) -> Failure | None:
        """Ask for one token, once for all who want to know at the same time. None: it came."""
        if self._asking is not None:
            await self._asking.wait()
            return self._doubt
        if self._clock() - self._evidence_s < FRESH_S and self.may_ask():
            return None
        return await self._ask()

    async def run(self) -> None:
        """Probe whenever one is due: each interval without good answers, and at the end of each pause."""
        while True:
            self._moved = anyio.Event()
            self._move(tick(self._state, self._clock()))
            wait_s = next_look_s(self._state, self._evidence_s, self._interval_s) - self._clock()
            if wait_s > 0:
                with anyio.move_on_after(wait_s):
                    await self._moved.wait()
            elif isinstance(self._state, (Closed, HalfOpen)):
                await self.suspected() if self._asking else await self._ask()

    async def _ask(self) -> Failure | None:
        self._asking = anyio.Event()
        failure: Failure | None = Failure("closed", "the probe was cancelled")
        try:
            probe = await self._probe()
            failure = None if probe.is_good or self._wants_clients_key(probe) else probe.failure or Failure("malformed", probe.reason)
            self._evidence_s = self._clock()
            if failure is None:
                self.succeeded(by_probe=True)
            else:
                self.failed(failure, by_probe=True)
        finally:
            self._doubt = failure
            self._asking.set()
            self._asking = None
        return failure

    def _wants_clients_key(self, probe: Probe) -> bool:
        """Without a key of our own, being asked for one, or to pay or ask less without one, is all that a working primary can answer."""
        return not self._key_is_ours and probe.reason in ("HTTP 401", "HTTP 402", "HTTP 403", "HTTP 429")

    def _move(self, state: Breaker) -> None:
        before, self._state = self._state, state
        if isinstance(before, Closed) and isinstance(state, Closed):
            if state.weight > before.weight:
                self._moved.set()  # a doubt is looked into sooner than the next probe was due
            return
        if type(before) is type(state):
            return
        self._moved.set()
        match state:
            case Open(cause=cause) if isinstance(before, Closed):
                level = logging.ERROR if cause.facts.pause_s >= 300 else logging.WARNING
                logger.log(level, "the primary is not asked any more: %s; this node answers", cause.words)
            case Closed():
                logger.info("the primary answers again")
            case _:
                pass
        self._on_change(before, state)
