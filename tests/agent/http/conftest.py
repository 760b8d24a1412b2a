"""A node's HTTP side over the fakes: in memory and as a real server on a free port."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import anyio
import httpx
import pytest
from prometheus_client import CollectorRegistry

from agent.batches.runner import BatchRunner, RunnerLimits
from agent.batches.store import BatchStore
from agent.http.app import Application, create_app
from agent.http.collaborators import Cameras, Limits, Meant, Services, Sightings, split_name
from agent.http.keys import KeyRules
from agent.http.outcome import Outcome
from agent.http.server import HttpServer, bind
from tests.agent.http.fakes import Eyes, Foreman, Node, Parrot, Switch


@dataclass
class House:
    """The fakes and the application over them; change the fakes, then ask."""

    text: Parrot = field(default_factory=Parrot)
    vision: Eyes = field(default_factory=Eyes)
    node: Node = field(default_factory=Node)
    demo: Switch = field(default_factory=Switch)
    keys: dict[bytes, KeyRules] = field(default_factory=dict)
    foreman: Foreman = field(default_factory=Foreman)
    limits: Limits = field(default_factory=Limits)
    cameras: Cameras | None = None
    sightings: Sightings | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    meant: Callable[[str], Meant] = split_name
    batches: BatchStore | None = None
    lines: RunnerLimits = field(default_factory=RunnerLimits)

    def app(self) -> Application:
        services = Services(
            "spare-1", self.node, self.node.gate, self.text, self.vision, self.demo, lambda: self.keys, self.foreman,
            cameras=self.cameras, sightings=self.sightings, record=self.outcomes.append, meant=self.meant, batches=self.batches,
        )  # fmt: skip
        return create_app(services, CollectorRegistry(), self.limits)


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture
async def client(house: House) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(house.app().asgi)
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
        yield client


@pytest.fixture
def serve() -> Iterator[Callable[[House], str]]:
    """Starts a house on a real server in a thread of its own; gives its URL. Every server is stopped at the end of the test."""
    stops: list[Callable[[], None]] = []

    def start(house: House) -> str:
        listener = bind("127.0.0.1", 0)
        up = threading.Event()
        held: list[HttpServer] = []

        async def main() -> None:
            app = house.app()
            server = HttpServer(app.asgi, listener, house.limits, stop_s=1, closing=app.closing)
            held.append(server)
            async with anyio.create_task_group() as tasks:
                if house.batches is not None:
                    runner = BatchRunner(house.batches, app.ask, lambda: house.node.is_open, house.lines, tick_s=0.05)
                    tasks.start_soon(runner.run)

                async def announce() -> None:
                    await server.started.wait()
                    up.set()

                tasks.start_soon(announce)
                await server.run()
                tasks.cancel_scope.cancel()

        thread = threading.Thread(target=anyio.run, args=(main,))
        thread.start()
        assert up.wait(10), "the server did not start"

        def stop() -> None:
            held[0].stop()
            thread.join(15)
            assert not thread.is_alive(), "the server did not stop"

        stops.append(stop)
        return held[0].url

    yield start
    for stop in stops:
        stop()
