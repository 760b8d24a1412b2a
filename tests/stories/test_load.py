"""More clients than a node can serve, for as long as HOTSPARE_LOAD_S says: nothing grows, nobody is forgotten, keys are served alike."""

from __future__ import annotations

import hashlib
import os
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.stories.house import CHAT, House, Node, until

LOAD_S = float(os.environ.get("HOTSPARE_LOAD_S", "60"))
pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(1.2 * LOAD_S + 240)]
KEYS = {"many": 48, "few": 16}  # clients of each
LEAVING = 0.1
QUEUE = "hotspare_queue_seconds"
WARM_S = max(15.0, LOAD_S / 5)  # until every buffer has met its largest batch


@dataclass
class Record:
    ends: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    asked: int = 0


async def one_client(client: httpx.AsyncClient, key: str, seed: int, record: Record) -> None:
    draw = random.Random(seed)
    headers = {"Authorization": f"Bearer {key}"}
    while True:
        words = " ".join(draw.choice(("river", "lamp", "seven", "green", "engine")) for _ in range(draw.choice((5, 40, 200))))
        body = {"model": CHAT, "prompt": f"{seed} {words}", "max_tokens": draw.choice((4, 16, 64)), "temperature": 0.7, "stream": True}
        leaves_at = draw.randrange(1, 4) if draw.random() < LEAVING else 0
        record.asked += 1
        started_s, events, text = time.monotonic(), 0, ""
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            if answer.status_code != 200:
                await answer.aread()
                record.ends[str(answer.status_code)] += 1
                await anyio.sleep(min(float(answer.headers["Retry-After"]), 1.0) * draw.uniform(0.5, 1.5))
                continue
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    if not events:
                        record.first_s.append(time.monotonic() - started_s)
                    events += 1
                    record.tokens[key] += 1
                    if leaves_at and events >= leaves_at:
                        break
                text = line or text
        record.ends["left" if leaves_at and events >= leaves_at else ended(text)] += 1


def ended(last: str) -> str:
    """How a stream did whose last line is this. After so long a wait that its head was sent, `busy` can only come as an event."""
    if last == "data: [DONE]":
        return "whole"
    return "gave way" if '"code":"busy"' in last.replace(" ", "") else "cut"


def quantile_s(metrics: str, name: str, share: float) -> float:
    """Of a histogram: within a bucket, as Prometheus does, as if evenly spread."""
    buckets: list[tuple[float, float]] = []
    for family in text_string_to_metric_families(metrics):
        buckets += [(float(entry.labels["le"]), entry.value) for entry in family.samples if entry.name == f"{name}_bucket"]
    wanted, low_s, below = share * buckets[-1][1], 0.0, 0.0
    for high_s, count in buckets:
        if count >= wanted:
            return low_s if high_s == float("inf") else low_s + (high_s - low_s) * (wanted - below) / max(1.0, count - below)
        low_s, below = high_s, count
    raise AssertionError(f"{name} has no bucket for {share}")


def resident_mb(node: Node, worker: int) -> tuple[float, float]:
    """Of the daemon and its text worker."""
    daemon, text = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (node.process.pid, worker))
    return daemon * os.sysconf("SC_PAGESIZE") / 1e6, text * os.sysconf("SC_PAGESIZE") / 1e6


async def test_sixty_four_clients(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{hashlib.sha256(key.encode()).hexdigest()}\n" for key in KEYS))
    keys.chmod(0o600)
    house, record = House(tmp_path), Record()
    settings = house.node_settings("edge-a", http={"keys_file": str(keys)})
    async with (
        house.node(settings) as node,
        httpx.AsyncClient(
            base_url=node.client.base_url, timeout=120.0, limits=httpx.Limits(max_connections=100), trust_env=False
        ) as client,
    ):
        node.client.headers["Authorization"] = "Bearer few"
        state = await node.until_serving(CHAT)
        (worker,) = [each["pid"] for each in state["workers"] if each["name"] == "text"]
        async with anyio.create_task_group() as tasks:
            for number, key in enumerate(key for key, count in KEYS.items() for _ in range(count)):
                tasks.start_soon(one_client, client, key, number, record)
            await anyio.sleep(WARM_S)
            warm_tokens, held_mb = Counter(record.tokens), [resident_mb(node, worker)]
            for _ in range(10):
                await anyio.sleep(LOAD_S / 10)
                held_mb.append(resident_mb(node, worker))
            tokens, warm_mb = record.tokens - warm_tokens, sum(held_mb[0])
            grown_mb = sum(held_mb[-1]) - warm_mb
            tasks.cancel_scope.cancel()

        async def answers() -> bool:
            answer = await node.client.post("/v1/completions", json={"model": CHAT, "prompt": "One, two,", "max_tokens": 4})
            return answer.status_code == 200

        await until(answers, 30, "the node answers as before")
        metrics = (await node.client.get("/metrics")).text
    waits = statistics.quantiles(record.first_s, n=100)
    print(  # noqa: T201  what the run is for
        f"\n{record.asked} requests, {dict(record.ends)}; tokens {dict(tokens)}; memory {warm_mb:.0f} MB {grown_mb:+.1f}, "
        f"daemon and worker {' '.join(f'{daemon:.0f}+{text:.0f}' for daemon, text in held_mb)}; "
        f"first token p50 {waits[49]:.2f} s, p99 {waits[98]:.2f} s; "
        f"queue p50 {quantile_s(metrics, QUEUE, 0.5):.2f} s, p99 {quantile_s(metrics, QUEUE, 0.99):.2f} s"
    )
    assert set(record.ends) <= {"whole", "left", "429", "gave way"}, "nobody waits for nothing, and nobody is cut off"
    assert record.asked - sum(record.ends.values()) <= sum(KEYS.values()), "each request has had an outcome, but for those in flight"
    assert grown_mb < 0.05 * warm_mb + 5
    assert tokens["few"] == pytest.approx(tokens["many"], rel=0.1)
