"""Watches the primary: one real request at a time, a verdict that does not flap, and the last hour for people."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import anyio
import httpx

from agent.gateway.probe import Probe, probe_primary
from agent.protocol.wire import wire_now
from coordinator.config import PrimarySettings
from coordinator.decide import Hysteresis

logger = logging.getLogger(__name__)

STRETCH_S = 15.0
STRETCHES = 240  # an hour of them; more where probes are further apart
NAMED = 3
REASON_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Stretch:
    """What the probes of `STRETCH_S` seconds saw: however often they come, an hour of them has the same size.

    `latency_ms`: of the slowest that got an answer; `reason`: of the last that failed; `is_down`: the verdict after the last;
    `serving`: how many nodes answered in its place then, `names` the first of them.
    """

    number: int
    began_at: datetime
    began_s: float  # this process's clock
    probes: int = 0
    failed: int = 0
    latency_ms: float | None = None
    reason: str = ""
    is_down: bool = False
    serving: int = 0
    names: tuple[str, ...] = ()

    def after(self, probe: Probe, is_down: bool, serving: Sequence[str]) -> Stretch:
        return replace(
            self,
            probes=self.probes + 1,
            failed=self.failed + (not probe.is_good),
            latency_ms=max(self.latency_ms or 0.0, probe.latency_ms) if probe.is_good else self.latency_ms,
            reason=self.reason if probe.is_good else probe.reason[:REASON_CHARACTERS],
            is_down=is_down,
            serving=len(serving),
            names=tuple(serving[:NAMED]),
        )


class Past:
    """The newest `STRETCHES`, the oldest first; in memory only."""

    def __init__(self) -> None:
        self.stretches: deque[Stretch] = deque(maxlen=STRETCHES)

    def add(self, probe: Probe, is_down: bool, serving: Sequence[str], now_s: float) -> None:
        last = self.stretches[-1] if self.stretches else None
        if last is not None and now_s - last.began_s < STRETCH_S:
            self.stretches[-1] = last.after(probe, is_down, serving)
        else:
            fresh = Stretch(last.number + 1 if last else 1, wire_now(), now_s)
            self.stretches.append(fresh.after(probe, is_down, serving))


class PrimaryWatch:
    """`health` is what decisions go by; `last_probe` and `past` are for people. `serving`: the nodes that answer in its place now."""

    def __init__(self, settings: PrimarySettings, client: httpx.AsyncClient, serving: Callable[[], Sequence[str]] = tuple) -> None:
        self.settings = settings
        self._client = client
        self._serving = serving
        self.health = Hysteresis(settings.failures, settings.passes)
        self.last_probe: Probe | None = None
        self.past = Past()

    async def run(self) -> None:
        while True:
            started_s = anyio.current_time()
            await self._probe()
            jittered_s = self.settings.interval_s * random.uniform(0.95, 1.05)
            await anyio.sleep(max(0.0, started_s + jittered_s - anyio.current_time()))

    async def _probe(self) -> None:
        settings, before = self.settings, self.last_probe
        try:
            key = (await anyio.Path(settings.key_file).read_text()).strip() if settings.key_file else ""
            probe = await probe_primary(self._client, settings.url, settings.model, key, settings.timeout_s)
        except Exception as error:  # noqa: BLE001 — our own fault, whatever it is, says nothing about the primary and must not end the watch
            self.last_probe = Probe(False, 0.0, f"not probed: {type(error).__name__}: {error}")
            if before is None or before.reason != self.last_probe.reason:
                logger.error("the primary cannot be probed, its last verdict stands: %s", error)  # noqa: TRY400 — the message says it all
            return
        self.last_probe = probe
        was, self.health = self.health, self.health.after_probe(probe.is_good)
        if was.is_down != self.health.is_down:
            logger.warning("primary %s is %s: %s", settings.url, "down" if self.health.is_down else "up again", probe.reason)
        self.past.add(probe, self.health.is_down, self._serving(), anyio.current_time())
