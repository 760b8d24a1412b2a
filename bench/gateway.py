"""What the gateway costs and what it saves: `python -m bench.gateway [--json FILE]`.

A stand-in primary, nginx as the coordinator renders it, and a node as gateway are processes of their own; requests go direct, through nginx
and through the gateway in turns. Then each fault, with the real local model: how long until the first word of this node, beside the budget
that the phase has. Then the same question again and again, from the cache; and how soon one request more than the node takes is refused,
by the queue of its model and by its door.

What takes a node a few milliseconds is measured by bare sockets in a process of their own (bench/wire.py): httpx alone needs several to
send a request and read the answer, and where it shares its process with the clients that keep the node busy, it waits for them too. Until
30 November 2026 kept and refused answers were measured so; and the 12 of 32 busy clients that the model's queue of 20 had no room for came
back at once, so that it was a node under a storm of refusals that was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import uvicorn

from agent.config import HttpSettings, WorkerSettings
from agent.demo.programs import free_port, program, write_nginx
from agent.demo.stage import to_toml
from bench.cloud import primary
from bench.gateway_tables import tables_of
from bench.report import machine, percentile, report
from bench.wire import asked, filled
from coordinator.config import NginxSettings
from coordinator.nginx import render
from models.tasks.generation.scheduler import SchedulerSettings

STORE = Path(".cache/store")
MODEL = "smollm2-135m-instruct"
BUDGET_S = 0.3
PARTS = ("overhead", "faults", "kept", "refused")
ROUNDS = 3
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


async def kept(ways: dict[str, int], client: httpx.AsyncClient, turns: int, seconds: float) -> dict[str, Any]:
    """The same questions again: one bare connection in turns with the stand-in's own answers, then sixteen at once; and httpx."""
    asked_again = {**ASKED, "temperature": 0}
    bodies = [{**asked_again, "seed": seed} for seed in range(64)]
    nodes = {way: port for way, port in ways.items() if way in ("gateway", "before")}
    await asked("ask", ports=nodes, bodies=[asked_again, *bodies], turns=1 + len(bodies), pause_s=0.02)
    await anyio.sleep(0.5)  # the writes follow
    seen = await asked("ask", ports={way: ways[way] for way in ("direct", *nodes)}, bodies=[asked_again], turns=turns)
    for way in nodes:
        if any(one["x-hotspare-cache"] != "hit" for one in seen[way]):
            raise RuntimeError(f"{way}: a kept answer was not found")
    alone = {way: middle([one["all_ms"] for one in answers]) for way, answers in seen.items()}
    crowd: dict[str, list[dict[str, Any]]] = {way: [] for way in nodes}
    for _ in range(3):
        for way, port in nodes.items():
            crowd[way].append(await asked("many", port=port, bodies=bodies, clients=16, seconds=seconds))
    took: list[float] = []
    for _ in range(turns):
        started_s = anyio.current_time()
        (await client.post("/v1/chat/completions", json=asked_again)).raise_for_status()
        took.append(1000 * (anyio.current_time() - started_s))
    return {"bare": alone, "crowd": {way: crowd_of(runs) for way, runs in crowd.items()}, "httpx": middle(took)}


def crowd_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    hits = sum(run["seen"].get("hit", 0) for run in runs)
    return {
        "answers_per_s": statistics.median(run["answers_per_s"] for run in runs),
        "hits": hits / max(1, sum(sum(run["seen"].values()) for run in runs)),
    }


async def refused(nodes: dict[str, int], clients: int, turns: int) -> dict[str, Any]:
    """While `clients` requests are in flight, as many as a node takes, one more on a connection of its own, by a process of its own."""
    body = {**ASKED, "model": MODEL, "temperature": 1.0, "max_tokens": 900, "stream": True}
    took: dict[str, list[float]] = {way: [] for way in nodes}
    for _ in range(ROUNDS):
        for way, port in nodes.items():
            async with filled(port, body, clients):
                await anyio.sleep(2.0)
                one_more = {**body, "stream": False, "max_tokens": 1}
                seen = await asked("ask", ports={way: port}, bodies=[one_more], turns=turns, pause_s=0.02, patience_s=0.3)
            took[way] += [one["all_ms"] for one in seen[way] if one["status"] == 429 and int(one["retry-after"]) > 0]
            await anyio.sleep(1.0)
    if any(len(each) < ROUNDS for each in took.values()):
        raise RuntimeError(f"not refused: {[(way, len(each)) for way, each in took.items()]} of {ROUNDS * turns}")
    return {way: middle(each) for way, each in took.items()}


async def until_serving(port: int) -> None:
    with anyio.fail_after(600):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            while True:
                models = (await client.get("/node")).json()["models"]
                if any(model["name"] == MODEL and model["status"] == "serving" for model in models):
                    return
                await anyio.sleep(0.2)


@asynccontextmanager
async def node(folder: Path, name: str, given: argparse.Namespace, primary_url: str, slots: int) -> AsyncIterator[int]:
    """The port of a node as gateway that serves the model; `before…`: of the other checkout's code."""
    port = free_port()
    settings = {
        "node": {"id": "bench", "state": str(folder / name)},
        "http": {"port": port},
        "worker": {"threads": 2, "context_tokens": 1024, "slots": slots},
        "models": {"store": str(given.store.absolute()), "serve": [MODEL], "aliases": {"cloud": MODEL}},
        "gateway": {"primary": primary_url, "first_byte_s": BUDGET_S, "first_token_s": BUDGET_S, "between_tokens_s": BUDGET_S},
    }
    file = folder / f"{name}.toml"
    file.write_text(to_toml(settings))
    code = given.before.absolute() if name.startswith("before") else Path.cwd()
    begin = f"import runpy, sys; sys.path[0] = {str(code)!r}; sys.argv[0] = 'hotspare'; runpy.run_module('agent.cli', run_name='__main__')"
    command = [sys.executable, "-c", begin, "run", "--config", str(file)]
    async with program(command, folder / f"{name}.log", port, dict(os.environ)):
        await until_serving(port)
        yield port


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotspare-bench-")))
        cloud, balancer = free_port(), free_port()
        await stack.enter_async_context(
            program([sys.executable, "-m", "bench.gateway", "--primary", str(cloud)], folder / "cloud.log", cloud)
        )
        (folder / "nginx").mkdir()
        snippet = folder / "nginx" / "hotspare.conf"
        url = f"http://127.0.0.1:{cloud}"
        snippet.write_text(render(NginxSettings(listen=f"127.0.0.1:{balancer}", bridge_port=free_port()), url, []))
        await stack.enter_async_context(program(write_nginx(folder / "nginx", snippet), folder / "nginx.log", balancer))
        names, slots = ("before", "gateway") if given.before else ("gateway",), WorkerSettings().slots
        nodes = {name: await stack.enter_async_context(node(folder, name, given, url, slots)) for name in names}
        ports = {"direct": cloud, "nginx": balancer, **nodes}
        ways = {}
        for way, port in ports.items():
            client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60.0)
            ways[way] = await stack.enter_async_context(client)
        found: dict[str, Any] = {}
        if "overhead" in given.parts:
            found["overhead"] = await overhead(ways, given.turns, given.seconds)
            found["bare"] = await bare(ports, given.turns)
        if "faults" in given.parts:
            found["faults"] = await faults(ways["gateway"], max(3, given.turns // 20))
        if "kept" in given.parts:
            found["kept"] = await kept(ports, ways["gateway"], given.turns, given.seconds)
        if "refused" in given.parts:
            queue = slots + SchedulerSettings().waiting
            most = HttpSettings().in_flight
            found["refused"] = {f"queue of {queue} full": await refused(nodes, queue, given.turns // ROUNDS)}
            wide = {
                name: await stack.enter_async_context(node(folder, f"{name}-wide", given, url, most - SchedulerSettings().waiting))
                for name in names
            }
            found["refused"][f"{most} being answered"] = await refused(wide, most, given.turns // ROUNDS)
        return found


async def bare(ports: dict[str, int], turns: int) -> dict[str, Any]:
    seen = await asked("ask", ports=ports, bodies=[{**ASKED, "stream": True}], turns=turns)
    return {way: {name: middle([one[name] for one in answers]) for name in ("first_ms", "all_ms")} for way, answers in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--primary", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, default=STORE, help="where model and engines are kept (%(default)s)")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement of throughput (%(default)s)")
    parser.add_argument("--before", type=Path, help="another checkout, whose node is measured in turns with this one's")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (all)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.primary:
        uvicorn.run(primary, host="127.0.0.1", port=given.primary, log_level="critical", access_log=False)
        return
    figures = {"machine": machine(), "budget_s": BUDGET_S, **anyio.run(measure, given)}
    report(tables_of(figures), ["Clients, primary and node share this machine's cores."], figures, given.json)


if __name__ == "__main__":
    main()
