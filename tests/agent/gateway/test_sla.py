"""The record of answers: what is counted, what survives, and what people are told."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
import pytest

from agent.gateway.levels import BOUNDS_MS, Hour, told, total
from agent.gateway.sla import HOUR_S, SlaRecord
from agent.http.outcome import Backend, Outcome
from tests.agent.gateway import primaries
from tests.agent.gateway.conftest import Setup
from tests.conftest import ROOT

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]
NOON_S = 1_700_049_600.0


@dataclass
class Clock:
    now_s: float = NOON_S

    def __call__(self) -> float:
        return self.now_s


def outcome(backend: Backend = "primary", is_good: bool = True, latency_ms: float = 100.0, cloud_calls: int = 1) -> Outcome:
    return Outcome(backend, is_good, latency_ms, latency_ms / 2, cloud_calls, "")


def test_counts_become_the_two_promises() -> None:
    hour = Hour()
    for _ in range(6):
        hour.add(outcome())
    for _ in range(3):
        hour.add(outcome("cache", cloud_calls=0, latency_ms=2.0))
    hour.add(outcome("local", is_good=False, cloud_calls=2, latency_ms=9000.0))
    values = told(hour)
    assert (values["requests"], values["primary"], values["cache"], values["failed"]) == (10, 6, 3, 1)
    assert (values["availability"], values["saved_share"], values["cloud_calls"]) == (0.9, 0.3, 8)
    assert values["latency_ms"]["p50"] == pytest.approx(100, rel=0.25)
    assert values["latency_ms"]["p99"] == pytest.approx(9000, rel=0.25)
    assert told(total([hour, hour]))["requests"] == 20
    assert told(Hour())["availability"] is None
    assert Hour.unpacked(json.loads(json.dumps(hour.packed()))) == hour
    assert BOUNDS_MS[-1] > 600_000, "as long as an answer may take"


async def run_for(record: SlaRecord) -> None:
    """Start and end, as a node does."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(record.run)
        await anyio.sleep(0.1)
        tasks.cancel_scope.cancel()


async def test_hours_and_days_are_kept_over_restarts_and_clock_jumps(tmp_path: Path) -> None:
    clock = Clock()
    record = SlaRecord(tmp_path / "sla.sqlite", clock)
    for hours in (-24 * 40, -30, -1, 0, 0, 24 * 365):  # a month ago and more; and a clock that was a year ahead
        clock.now_s = NOON_S + hours * HOUR_S
        record.told(outcome())
    await run_for(record)
    clock.now_s = NOON_S
    again = SlaRecord(tmp_path / "sla.sqlite", clock)
    again.told(outcome("local", cloud_calls=0))  # before the file was read
    await run_for(again)
    report = again.report()
    assert [(hour["from"], hour["requests"]) for hour in report["hours"]][-2:] == [("2023-11-15T11:00:00Z", 1), ("2023-11-15T12:00:00Z", 3)]
    assert report["last_24_hours"]["requests"] == 4
    assert report["last_31_days"]["requests"] == 5
    assert [day["requests"] for day in report["days"]] == [1, 4]
    third = SlaRecord(tmp_path / "sla.sqlite", clock)
    await run_for(third)
    assert third.report()["last_31_days"]["requests"] == 5, "counted once"


async def test_a_broken_file_and_a_full_disk_cost_a_line_and_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "sla.sqlite"
    file.write_bytes(b"no database" * 1000)
    record = SlaRecord(file, Clock())
    record.told(outcome())
    await run_for(record)
    assert SlaRecord(file, Clock()).report()["last_24_hours"]["requests"] == 0, "not read yet"
    connection = sqlite3.connect(file)
    connection.execute("INSERT INTO hours VALUES (5, '{}')")
    connection.commit()
    connection.close()
    caplog.clear()
    again = SlaRecord(file, Clock())
    await run_for(again)
    assert again.report()["last_24_hours"]["requests"] == 1
    assert len([one for one in caplog.records if one.levelno >= logging.WARNING]) == 1
    blocked = SlaRecord(file / "below a file", Clock())
    caplog.clear()
    await run_for(blocked)
    assert len(caplog.records) == 1


WRITER = """
import sys, anyio
from agent.gateway import sla
from agent.http.outcome import Outcome
sla.SAVE_S = 0.001
from pathlib import Path
record = sla.SlaRecord(Path(sys.argv[1]), lambda: 1_700_049_600.0)
async def main():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(record.run)
        while True:
            record.told(Outcome("primary", True, 1.0, 1.0, 1, ""))
            await anyio.sleep(0.0005)
anyio.run(main)
"""


async def test_a_kill_loses_moments_and_breaks_nothing(tmp_path: Path) -> None:
    file = tmp_path / "sla.sqlite"
    seen = 0
    for _ in range(3):
        process = await anyio.open_process([sys.executable, "-c", WRITER, str(file)], env={**os.environ, "PYTHONPATH": str(ROOT)})
        with anyio.fail_after(20):
            while True:
                await anyio.sleep(0.05)
                record = SlaRecord(file, Clock())
                if file.exists():
                    await run_for(record)
                if record.report()["last_24_hours"]["requests"] > seen + 20:
                    break
        process.send_signal(signal.SIGKILL)
        await process.wait()
        record = SlaRecord(file, Clock())
        await run_for(record)
        now = record.report()["last_24_hours"]["requests"]
        assert now > seen, "nothing that was counted is lost again"
        seen = now
    assert not file.with_name("sla.sqlite.broken").exists()


async def test_requests_are_recorded_and_told_over_http_and_to_prometheus(setup: Setup, tmp_path: Path) -> None:
    record = SlaRecord(tmp_path / "sla.sqlite", Clock(), lambda: {"state": "closed"})
    setup.sla = record
    setup.breaker = replace(setup.breaker, opens_at=99.0)
    asked = {"model": "deepseek-chat", "messages": [{"role": "user", "content": "hi"}]}
    async with setup.running(probes=False) as house:
        await house.client.post("/v1/chat/completions", json=asked)
        setup.cloud.behave = primaries.status(503)
        await house.client.post("/v1/chat/completions", json=asked)
        setup.cloud.behave = primaries.cut_at(700)
        await house.client.post("/v1/chat/completions", json={**asked, "stream": True})
        await house.client.post("/v1/chat/completions", json={**asked, "temperature": -1, "model": "parrot"})
        await house.client.post("/v1/chat/completions", json={**asked, "stream": True, "logprobs": True})
        report = (await house.client.get("/sla")).json()
        told = report["last_24_hours"]
        assert {name: told[name] for name in ("requests", "primary", "local", "continued", "failed")} == {
            "requests": 5, "primary": 1, "local": 2, "continued": 1, "failed": 1,
        }  # fmt: skip
        assert report["targets"] == {"availability": 0.9999, "saved_share": 0.3}
        assert report["primary"] == {"state": "closed"}
        metrics = (await house.client.get("/metrics")).text
        assert 'hotspare_answers_total{backend="continued",cause="cut",outcome="good"} 1.0' in metrics
        assert 'hotspare_answers_total{backend="primary",cause="",outcome="good"} 1.0' in metrics
        assert "hotspare_saved_cloud_calls_total 1.0" in metrics
        assert f"hotspare_cloud_calls_total {told['cloud_calls']:.1f}" in metrics
