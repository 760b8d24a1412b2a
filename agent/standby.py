"""Holds the node's mode: feeds the pure machine of mode.py with facts, obeys orders that move the lease, tells of changes.

The frozen `state` is replaced as a whole, on the event loop only; readers take it and ask `may_serve`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

import anyio
from anyio import to_thread

from agent.link.outcome import CommandFailed, Output, Progress
from agent.link.reports import Standing
from agent.link.store import StoreError
from agent.mode import Allowed, Autonomy, Facts, Health, ModePolicy, ModeState, Refused, advance, may_serve
from agent.protocol import lease as leases
from agent.protocol.lease import Decision, LeaseOrder, LeaseState

logger = logging.getLogger(__name__)

TICK_S = 1.0
AUTONOMY_SAVE_S = 300.0


class StandbyStore(Protocol):
    def save_lease(self, lease: LeaseState) -> None: ...

    def save_autonomy(self, autonomy: Autonomy | None) -> None: ...


class Standby:
    """`run()` ticks, probes the primary while the coordinator is out of reach, and keeps autonomy durable (L8).

    `lease` and `autonomy` are what the store held at start. `prepare` warms up what a lease needs before `activate` is done.
    `probe_primary` answers whether one real request succeeded and never raises; None: no autonomy.
    """

    def __init__(
        self,
        *,
        store: StandbyStore,
        lease: LeaseState,
        autonomy: Autonomy | None,
        clock: Callable[[], float],
        health: Callable[[], Health],
        inflight: Callable[[], int],
        probe_primary: Callable[[], Awaitable[bool]] | None,
        on_change: Callable[[ModeState, ModeState], None],
        prepare: Callable[[], Awaitable[None]] | None = None,
        policy: ModePolicy = ModePolicy(),  # noqa: B008 - frozen
        probe_interval_s: float = 30.0,
        probe_timeout_s: float = 10.0,
    ) -> None:
        self._store = store
        self._clock = clock
        self._health = health
        self._inflight = inflight
        self._probe_primary = probe_primary
        self._on_change = on_change
        self._prepare = prepare
        self._policy = policy
        self._probe_interval_s = probe_interval_s
        self._probe_timeout_s = probe_timeout_s
        self._coordinator_is_reachable = False
        self._failures = self._passes = 0
        self._saved = autonomy
        self._wake = anyio.Event()
        self._moved = anyio.Event()
        now_s = clock()
        self.state = ModeState(since_s=now_s, lease=lease, autonomy=autonomy, autonomous_since_s=now_s)

    @property
    def lease(self) -> LeaseState:
        return self.state.lease

    def may_serve(self) -> Allowed | Refused:
        return may_serve(self.state, self._clock())

    def standing(self) -> Standing:
        state, now_s = self.state, self._clock()
        held = state.lease.held(now_s)
        left_s = state.lease.left_s(now_s) if held else None
        return Standing(state.mode, state.lease.epoch, now_s - state.since_s, held, left_s)

    def uplink_changed(self, *, broker_is_up: bool, coordinator_is_online: bool) -> None:
        self._coordinator_is_reachable = broker_is_up and coordinator_is_online
        if self._coordinator_is_reachable and self.state.autonomy is None:
            self._failures = self._passes = 0
        self._advance()

    def health_changed(self) -> None:
        """Saves waiting for the next tick."""
        self._advance()

    def decide(self, order: LeaseOrder) -> Decision:
        return leases.decide(order, self.lease, self._clock())

    def adopt(self, lease: LeaseState) -> None:
        """Makes an accepted lease so; it is in the store already (L2)."""
        self._advance(lease)

    async def carry_out(self, order: LeaseOrder, progress: Progress) -> Output:
        """Waits until an adopted order has had its effect. Raises CommandFailed."""
        self._check_current(order)
        match order.op:
            case "activate":
                await self._activate(order, progress)
            case "standby" | "drain":
                while self.state.mode == "draining":
                    await progress(None, f"{self._inflight()} in flight")
                    await self._next_move(order)
            case "renew":
                pass
        standing = self.standing()
        return {"mode": standing.mode, "epoch": standing.epoch, "lease_left_s": standing.lease_left_s}

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            if self._probe_primary is not None:
                tasks.start_soon(self._probe, self._probe_primary)
            while True:
                self._advance()
                await self._save_autonomy()
                with anyio.move_on_after(TICK_S):
                    await self._wake.wait()
                self._wake = anyio.Event()

    async def _activate(self, order: LeaseOrder, progress: Progress) -> None:
        if self.lease.held(self._clock()) is None:
            raise CommandFailed("interrupted", "the lease ended before it had an effect; activate with a higher epoch", is_retryable=True)
        try:
            if self._prepare is not None:
                await progress(None, "warming up")
                await self._prepare()
            while self.state.mode not in ("active", "standby", "autonomous"):
                if self._health() == "degraded":
                    raise CommandFailed(
                        "unhealthy", "the node cannot serve now; see its state for the models that failed", is_retryable=True
                    )
                await progress(None, self.state.mode)
                await self._next_move(order)
            if self.lease.held(self._clock()) is None:
                raise CommandFailed("expired", "the lease ended while the node was warming up; give it a longer one", is_retryable=True)
        except CommandFailed:
            if self.lease.last_id == order.id:  # else a newer order rules, and its lease is not ours to give up
                given_up = leases.without_lease(self.lease)
                await to_thread.run_sync(self._store.save_lease, given_up)
                self.adopt(given_up)
            raise

    async def _next_move(self, order: LeaseOrder) -> None:
        with anyio.move_on_after(TICK_S):
            await self._moved.wait()
        self._check_current(order)

    def _check_current(self, order: LeaseOrder) -> None:
        if self.lease.epoch != order.epoch:
            raise CommandFailed("stale_epoch", f"overtaken by an order with epoch {self.lease.epoch}", output={"current": self.lease.epoch})

    def _advance(self, lease: LeaseState | None = None) -> None:
        before = self.state
        facts = Facts(
            now_s=self._clock(),
            lease=lease or before.lease,
            health=self._health(),
            coordinator_is_reachable=self._coordinator_is_reachable,
            primary_failures=self._failures,
            primary_passes=self._passes,
            inflight=self._inflight(),
        )
        self.state = after = advance(before, facts, self._policy)
        if (before.mode, before.reason) != (after.mode, after.reason):
            logger.info("mode %s (%s) after %s (%s), epoch %s", after.mode, after.reason, before.mode, before.reason, after.lease.epoch)
        if before.autonomy != after.autonomy:
            self._wake.set()
        if before != after:
            self._moved.set()
            self._moved = anyio.Event()
            self._on_change(before, after)

    async def _probe(self, probe_primary: Callable[[], Awaitable[bool]]) -> None:
        while True:
            if self._coordinator_is_reachable and self.state.autonomy is None:
                self._failures = self._passes = 0
                with anyio.move_on_after(TICK_S):
                    await self._moved.wait()
                continue
            is_healthy = False
            with anyio.move_on_after(self._probe_timeout_s):
                is_healthy = await probe_primary()
            self._failures, self._passes = (0, self._passes + 1) if is_healthy else (self._failures + 1, 0)
            self._advance()
            await anyio.sleep(self._probe_interval_s * random.uniform(0.9, 1.1))

    async def _save_autonomy(self) -> None:
        autonomy, state = self.state.autonomy, self.state
        if autonomy is not None:
            autonomy = replace(autonomy, spent_s=autonomy.spent_s + self._clock() - state.autonomous_since_s)
        if (autonomy is None) == (self._saved is None) and (
            autonomy is None or self._saved is None or autonomy.spent_s - self._saved.spent_s < AUTONOMY_SAVE_S
        ):
            return
        try:
            await to_thread.run_sync(self._store.save_autonomy, autonomy)
        except StoreError as error:
            logger.warning("autonomy would not survive a reboot now: %s", error)
        self._saved = autonomy
