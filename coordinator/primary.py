"""Watches the primary: one real request at a time, and a verdict that does not flap."""

from __future__ import annotations

import logging
import random

import anyio
import httpx

from agent.gateway.probe import Probe, probe_primary
from coordinator.config import PrimarySettings
from coordinator.decide import Hysteresis

logger = logging.getLogger(__name__)


class PrimaryWatch:
    """`health` is what decisions go by; `last_probe` is for people."""

    def __init__(self, settings: PrimarySettings, client: httpx.AsyncClient) -> None:
        self._settings = settings
        self._client = client
        self.health = Hysteresis(settings.failures, settings.passes)
        self.last_probe: Probe | None = None

    async def run(self) -> None:
        while True:
            started_s = anyio.current_time()
            await self._probe()
            jittered_s = self._settings.interval_s * random.uniform(0.95, 1.05)
            await anyio.sleep(max(0.0, started_s + jittered_s - anyio.current_time()))

    async def _probe(self) -> None:
        settings, before = self._settings, self.last_probe
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
