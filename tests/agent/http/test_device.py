"""What the device measures, as Prometheus and /node tell it."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

from agent.telemetry.generic import Reading
from tests.agent.http.conftest import House

pytestmark = pytest.mark.anyio


async def test_what_is_measured_is_told_and_nothing_else(client: httpx.AsyncClient, house: House) -> None:
    house.node.now = replace(house.node.now, device=Reading())
    assert "hotspare_device_power_watts" not in (await client.get("/metrics")).text
    measured = Reading(31.0, 62.3, 9216, 15657, {"gpu": 58.0, "cpu": 51.2}, 17.2, False)
    house.node.now = replace(house.node.now, device=measured)
    told = dict(line.rsplit(" ", 1) for line in (await client.get("/metrics")).text.splitlines() if line.startswith("hotspare_device"))
    figures = {name.removeprefix("hotspare_device_"): round(float(value), 3) for name, value in told.items()}
    assert figures == {
        "cpu_ratio": 0.31, "gpu_ratio": 0.623, "memory_used_bytes": 9216 << 20, "memory_bytes": 15657 << 20, "power_watts": 17.2,
        "throttled": 0, 'temperature_celsius{zone="gpu"}': 58, 'temperature_celsius{zone="cpu"}': 51.2,
    }  # fmt: skip
    assert (await client.get("/node")).json()["device"]["temperatures_c"] == {"gpu": 58.0, "cpu": 51.2}
