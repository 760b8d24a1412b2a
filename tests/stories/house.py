"""The whole product as processes on this machine, for stories: broker, balancer, coordinator, a switchable primary, nodes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from anyio.abc import Process

from agent.demo.programs import free_port, nginx_command, program, write_mosquitto, write_nginx
from agent.demo.stage import to_toml
from coordinator.config import NginxSettings
from coordinator.nginx import render
from tests.conftest import ROOT

PATH = "/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin"
# Artefacts and engines are kept between runs: what is tested is the serving of them, their making has tests of its own.
STORE = Path(os.environ.get("HOTSPARE_TEST_CACHE", ROOT / ".cache")) / "store"
CHAT = "smollm2-135m-instruct"
QUESTION = {"model": CHAT, "temperature": 0, "messages": [{"role": "user", "content": "What is the capital of France?"}]}

needs_programs = pytest.mark.skipif(
    any(shutil.which(name, path=PATH) is None for name in ("mosquitto", "nginx")), reason="mosquitto or nginx is not installed"
)


async def until(holds: Callable[[], Awaitable[Any]], deadline_s: float, what: str) -> Any:
    """Ask until the answer is true; a failing connection counts as no."""
    answer: Any = None
    with anyio.move_on_after(deadline_s):
        while True:
            try:
                answer = await holds()
                if answer:
                    return answer
            except httpx.TransportError as error:
                answer = error
            await anyio.sleep(0.05)
    raise AssertionError(f"{what}: not within {deadline_s:g} s; the last answer was {answer!r}")


@dataclass
class Node:
    """One node process and a client of its API."""

    process: Process
    client: httpx.AsyncClient
    log: Path

    async def state(self) -> dict[str, Any]:
        answer = await self.client.get("/node")
        values: dict[str, Any] = answer.json()
        return values

    async def until_serving(self, *models: str, deadline_s: float = 180.0) -> dict[str, Any]:
        async def serves() -> dict[str, Any] | None:
            if self.process.returncode is not None:
                raise AssertionError(f"the node ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")
            state = await self.state()
            serving = {model["name"] for model in state["models"] if model["status"] == "serving"}
            return state if serving >= set(models) else None

        state: dict[str, Any] = await until(serves, deadline_s, f"{models} served")
        return state

    async def until_mode(self, mode: str, deadline_s: float = 20.0) -> dict[str, Any]:
        async def is_so() -> dict[str, Any] | None:
            state = await self.state()
            return state if state["mode"] == mode else None

        state: dict[str, Any] = await until(is_so, deadline_s, f"mode {mode}")
        return state


@dataclass
class House:
    """Folder and ports of one story."""

    folder: Path
    broker: int = field(default_factory=free_port)
    front: int = field(default_factory=free_port)
    coordinator: int = field(default_factory=free_port)

    def node_settings(self, name: str, **changes: Mapping[str, Any]) -> dict[str, Any]:
        settings: dict[str, dict[str, Any]] = {
            "node": {"id": name, "state": str(self.folder / name)},
            "http": {"port": free_port()},
            "worker": {"threads": 2, "context_tokens": 1024},
            "cache": {"ttl_s": 0},
            "models": {"store": str(STORE), "serve": [CHAT]},
        }
        for section, values in changes.items():
            settings[section] = {**settings.get(section, {}), **values}
        return settings

    @asynccontextmanager
    async def node(self, settings: dict[str, Any], environment: Mapping[str, str] | None = None) -> AsyncIterator[Node]:
        name, port = settings["node"]["id"], settings["http"]["port"]
        file, log = self.folder / f"{name}.toml", self.folder / f"{name}.log"
        file.write_text(to_toml(settings))
        command = [sys.executable, "-m", "agent.cli", "run", "--config", str(file)]
        async with (
            program(command, log, port, environment) as process,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60.0, trust_env=False) as client,
        ):
            yield Node(process, client, log)

    @asynccontextmanager
    async def mosquitto(self) -> AsyncIterator[None]:
        async with program(write_mosquitto(self.folder / "broker", self.broker), self.folder / "mosquitto.log", self.broker):
            yield

    @asynccontextmanager
    async def control(self, primary_url: str, **leases: Any) -> AsyncIterator[httpx.AsyncClient]:
        """nginx and the coordinator; yields a client of the coordinator's API."""
        (self.folder / "nginx").mkdir()
        snippet = self.folder / "nginx" / "hotspare.conf"
        nginx = NginxSettings(listen=f"127.0.0.1:{self.front}", bridge_port=free_port())
        snippet.write_text(render(nginx, primary_url, []))
        settings = {
            "database": str(self.folder / "registry.sqlite"),
            "primary": {"url": primary_url, "interval_s": 0.3, "timeout_s": 2.0, "passes": 3},
            "broker": {"port": self.broker},
            "leases": {"lease_s": 6.0, "renew_s": 2.0, "min_active_s": 1.0, **leases},
            "nginx": {
                "file": str(snippet),
                "listen": nginx.listen,
                "bridge_port": nginx.bridge_port,
                "reload_command": [*nginx_command(self.folder / "nginx"), "-s", "reload"],
                "min_interval_s": 0.2,
            },
            "http": {"port": self.coordinator},
        }
        file = self.folder / "coordinator.toml"
        file.write_text(to_toml(settings))
        command = [sys.executable, "-m", "agent.cli", "coordinator", "--config", str(file)]
        async with (
            program(write_nginx(self.folder / "nginx", snippet), self.folder / "nginx.log", self.front),
            program(command, self.folder / "coordinator.log", self.coordinator),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.coordinator}", timeout=10.0, trust_env=False) as client,
        ):
            yield client
