"""What the gateway costs and what it saves: `python -m bench.gateway [--json FILE]`.

A stand-in primary, nginx as the coordinator renders it, and a node as gateway are processes of their own; requests go direct, through nginx
and through the gateway in turns. Then each fault, with the real local model: how long until the first word of this node, beside the budget
that the phase has. Then the same question again and again, from the cache; and how soon one request more than the node takes is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import httpx
import uvicorn

from agent.config import HttpSettings
from agent.demo.programs import free_port, program, write_nginx
from agent.demo.stage import to_toml
from bench.cloud import WORDS, primary
from bench.report import machine, percentile, report, table
from coordinator.config import NginxSettings
from coordinator.nginx import render

STORE = Path(".cache/store")
MODEL = "smollm2-135m-instruct"
BUDGET_S = 0.3
FAULTS = ("402", "429", "500", "503", "hang", "head then hang", "comments only", "cut", "stalled", "garbage")
ASKED: dict[str, Any] = {"model": "cloud", "max_tokens": 32, "messages": [{"role": "user", "content": "What is the capital of France?"}]}


async def timed(client: httpx.AsyncClient, more: dict[str, Any], until_word: str = "") -> tuple[float, float, str, str]:
    """(ms to the first event with text, ms in all, header, text); `until_word`: the first event after this text counts."""
    started_s, first_ms, text = anyio.current_time(), 0.0, ""
    async with client.stream("POST", "/v1/chat/completions", json={**ASKED, "stream": True, **more}) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:]).get("choices", ()):
                    word = choice["delta"].get("content") or ""
                    if word and not first_ms and text.strip() == until_word:
                        first_ms = 1000 * (anyio.current_time() - started_s)
                    text += word
        return first_ms, 1000 * (anyio.current_time() - started_s), answer.headers.get("x-hotspare-backend", ""), text


async def rate(client: httpx.AsyncClient, more: dict[str, Any], clients: int, seconds: float) -> float:
    """Whole answers a second."""
    count = 0
    with anyio.move_on_after(seconds):
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                nonlocal count
                while True:
                    (await client.post("/v1/chat/completions", json={**ASKED, **more})).raise_for_status()
                    count += 1

            for _ in range(clients):
                tasks.start_soon(ask)
    return count / seconds


def middle(values: list[float]) -> dict[str, float]:
    return {"p50": statistics.median(values), "p95": percentile(values, 0.95)}


async def overhead(ways: dict[str, httpx.AsyncClient], turns: int, seconds: float) -> dict[str, Any]:
    firsts: dict[str, list[float]] = {way: [] for way in ways}
    totals: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns):
        for way, client in ways.items():
            first_ms, all_ms, _, _ = await timed(client, {})
            if turn >= 5:
                firsts[way].append(first_ms)
                totals[way].append(all_ms)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3):
        for way, client in ways.items():
            rates[way].append(await rate(client, {}, 16, seconds))
    return {
        way: {"first_ms": middle(firsts[way]), "stream_ms": middle(totals[way]), "answers_per_s": statistics.median(rates[way])}
        for way in ways
    }


async def faults(client: httpx.AsyncClient, turns: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    alone = [(await timed(client, {"model": MODEL, "temperature": 0.01}))[0] for _ in range(turns + 2)][2:]
    found["none: the local model alone"] = {**middle(alone), "backend": "local"}
    for fault in FAULTS:
        took = []
        for _ in range(turns):
            for _ in range(4):  # good answers between, so that the breaker stays closed and every request meets the fault
                await timed(client, {})
            begun = "The capital of France" if fault in ("cut", "stalled") else ""
            first_ms, _, backend, text = await timed(client, {"user": fault, "temperature": 0.01}, begun)
            if not text.strip() or not first_ms:
                raise RuntimeError(f"{fault}: no answer of this node: {text!r}")
            took.append(first_ms)
        found[fault] = {**middle(took), "backend": backend}
    return found


async def cached(client: httpx.AsyncClient, turns: int) -> dict[str, Any]:
    asked = {**ASKED, "temperature": 0}
    took: list[float] = []
    for turn in range(turns + 5):
        started_s = anyio.current_time()
        answer = await client.post("/v1/chat/completions", json=asked)
        if turn >= 5:
            if answer.headers["x-hotspare-cache"] != "hit":
                raise RuntimeError("a kept answer was not found")
            took.append(1000 * (anyio.current_time() - started_s))
        else:
            await anyio.sleep(0.1)
    return {**middle(took), "answers_per_s": await rate(client, {"temperature": 0}, 8, 3.0)}


async def refused(client: httpx.AsyncClient, turns: int) -> dict[str, Any]:
    """While as many are being answered as the node takes."""
    asked = {**ASKED, "model": MODEL, "temperature": 1.0, "max_tokens": 900}
    took: list[float] = []

    async def fill() -> None:
        while True:
            await client.post("/v1/chat/completions", json=asked)

    async with anyio.create_task_group() as tasks:
        for _ in range(HttpSettings().in_flight):
            tasks.start_soon(fill)
        await anyio.sleep(1.0)
        with anyio.fail_after(120):
            while len(took) < turns:
                started_s = anyio.current_time()
                answer = await client.post("/v1/chat/completions", json=asked)
                if answer.status_code == httpx.codes.TOO_MANY_REQUESTS and int(answer.headers["retry-after"]) > 0:
                    took.append(1000 * (anyio.current_time() - started_s))
        tasks.cancel_scope.cancel()
    return middle(took)


async def serving(client: httpx.AsyncClient) -> AsyncIterator[None]:
    while True:
        models = (await client.get("/node")).json()["models"]
        if any(model["name"] == MODEL and model["status"] == "serving" for model in models):
            return
        yield


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotspare-bench-")))
        cloud, balancer, node = free_port(), free_port(), free_port()
        await stack.enter_async_context(
            program([sys.executable, "-m", "bench.gateway", "--primary", str(cloud)], folder / "cloud.log", cloud)
        )
        (folder / "nginx").mkdir()
        snippet = folder / "nginx" / "hotspare.conf"
        url = f"http://127.0.0.1:{cloud}"
        snippet.write_text(render(NginxSettings(listen=f"127.0.0.1:{balancer}", bridge_port=free_port()), url, []))
        await stack.enter_async_context(program(write_nginx(folder / "nginx", snippet), folder / "nginx.log", balancer))
        settings = {
            "node": {"id": "bench", "state": str(folder / "state")},
            "http": {"port": node},
            "worker": {"threads": 2, "context_tokens": 1024},
            "models": {"store": str(given.store.absolute()), "serve": [MODEL], "aliases": {"cloud": MODEL}},
            "gateway": {"primary": url, "first_byte_s": BUDGET_S, "first_token_s": BUDGET_S, "between_tokens_s": BUDGET_S},
        }
        file = folder / "node.toml"
        file.write_text(to_toml(settings))
        command = [sys.executable, "-m", "agent.cli", "run", "--config", str(file)]
        await stack.enter_async_context(program(command, folder / "node.log", node, dict(os.environ)))
        ways = {}
        for way, port in (("direct", cloud), ("nginx", balancer), ("gateway", node)):
            client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60.0)
            ways[way] = await stack.enter_async_context(client)
        with anyio.fail_after(600):
            async for _ in serving(ways["gateway"]):
                await anyio.sleep(0.2)
        return {
            "overhead": await overhead(ways, given.turns, given.seconds),
            "faults": await faults(ways["gateway"], max(3, given.turns // 20)),
            "cached": await cached(ways["gateway"], given.turns),
            "refused": await refused(ways["gateway"], given.turns),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--primary", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, default=STORE, help="where model and engines are kept (%(default)s)")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement of throughput (%(default)s)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.primary:
        uvicorn.run(primary, host="127.0.0.1", port=given.primary, log_level="critical", access_log=False)
        return
    figures = {"machine": machine(), "budget_s": BUDGET_S, **anyio.run(measure, given)}
    direct = figures["overhead"]["direct"]["first_ms"]["p50"]
    ways = [
        (way, f"{one['first_ms']['p50']:.2f}", f"{one['first_ms']['p50'] - direct:+.2f}", f"{one['stream_ms']['p50']:.1f}",
         f"{one['answers_per_s']:.0f}")
        for way, one in figures["overhead"].items()
    ]  # fmt: skip
    broken = [(fault, f"{one['p50']:.0f}", f"{one['p95']:.0f}", one["backend"]) for fault, one in figures["faults"].items()]
    hit, no = figures["cached"], figures["refused"]
    tables = [
        table("A primary that is well", ("way", "first event ms", "added", f"stream of {WORDS} ms", "answers/s, 16 clients"), ways),
        table(f"First local word, budgets of {BUDGET_S:g} s", ("fault", "p50 ms", "p95 ms", "header"), broken),
        table(
            "A kept answer", ("p50 ms", "p95 ms", "answers/s"), [(f"{hit['p50']:.2f}", f"{hit['p95']:.2f}", f"{hit['answers_per_s']:.0f}")]
        ),
        table("Refused, for there is no room", ("p50 ms", "p95 ms"), [(f"{no['p50']:.2f}", f"{no['p95']:.2f}")]),
    ]
    report(tables, ["Client, primary and node share this machine's cores."], figures, given.json)


if __name__ == "__main__":
    main()
