"""Round trip of a command over a real mosquitto: our link, our whole node with its journal, and paho with its defaults.

    python bench/mqtt.py [--count 300] [--json FILE]

Each client runs in its own process, on loopback. The defaults of paho and mosquitto leave Nagle's algorithm on at both
ends; the table shows what that costs and what durability adds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import anyio
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

sys.path.insert(0, str(Path(__file__).parent.parent))

from agent.link.broker import Broker
from agent.link.mqtt import Link
from tests.agent.link.broker import Mosquitto, running_mosquitto
from tests.agent.link.node import running_node
from tests.agent.link.watcher import watching

WARM_UP = 20


def percentile(times_ms: list[float], share: float) -> float:
    return sorted(times_ms)[min(len(times_ms) - 1, int(len(times_ms) * share))]


def echo_with_paho(port: int) -> None:
    client = Client(CallbackAPIVersion.VERSION2, client_id="echo", protocol=MQTTv5)
    client.on_connect = lambda c, *_: c.subscribe("bench/cmd", 1)
    client.on_message = lambda c, _data, message: c.publish("bench/res", message.payload, 1)
    client.connect("127.0.0.1", port)
    client.loop_forever()


def echo_with_link(port: int) -> None:
    async def main() -> None:
        async with Link(Broker("127.0.0.1", port, "echo")) as link, anyio.create_task_group() as tasks:
            await link.subscribe(["bench/cmd"])
            async for message in link.messages():
                link.acknowledge(message)
                tasks.start_soon(link.publish, "bench/res", message.payload)

    anyio.run(main)


def node(port: int, folder: str) -> None:
    async def main() -> None:
        async with running_node("127.0.0.1", port, Path(folder)):
            await anyio.sleep_forever()

    anyio.run(main)


def ask_with_paho(port: int, count: int) -> list[float]:
    answered, ready, times_ms = threading.Event(), threading.Event(), []
    client = Client(CallbackAPIVersion.VERSION2, client_id="asker", protocol=MQTTv5)
    client.on_connect = lambda c, *_: c.subscribe("bench/res", 1)
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = lambda *_: answered.set()
    client.connect("127.0.0.1", port)
    client.loop_start()
    ready.wait(10)
    while not answered.wait(0.2):
        client.publish("bench/cmd", b"are you there", 1)
    time.sleep(0.5)
    for _ in range(count + WARM_UP):
        answered.clear()
        began_s = time.perf_counter()
        client.publish("bench/cmd", b'{"v":1,"op":"ping"}', 1)
        answered.wait(10)
        times_ms.append((time.perf_counter() - began_s) * 1000)
    client.disconnect()
    client.loop_stop()
    return times_ms[WARM_UP:]


async def ask_with_link(port: int, count: int) -> list[float]:
    times_ms = []
    async with Link(Broker("127.0.0.1", port, "asker", session_expiry_s=0)) as link:
        await link.subscribe(["bench/res"])
        messages = link.messages()
        is_answered = False
        while not is_answered:
            await link.publish("bench/cmd", b"are you there")
            with anyio.move_on_after(0.5) as waiting:
                link.acknowledge(await link._messages.receive())
            is_answered = not waiting.cancelled_caught
        for _ in range(count + WARM_UP):
            began_s = time.perf_counter()
            await link.publish("bench/cmd", b'{"v":1,"op":"ping"}')
            link.acknowledge(await messages.__anext__())
            times_ms.append((time.perf_counter() - began_s) * 1000)
        await messages.aclose()  # type: ignore[attr-defined]
    return times_ms[WARM_UP:]


async def ask_node(port: int, count: int) -> list[float]:
    times_ms = []
    async with watching("127.0.0.1", port) as watcher:
        await watcher.event("sync")
        for _ in range(count + WARM_UP):
            watcher.heard.clear()
            began_s = time.perf_counter()
            await watcher.final(await watcher.order("ping"))
            times_ms.append((time.perf_counter() - began_s) * 1000)
    return times_ms[WARM_UP:]


def measure(broker: Mosquitto, peer: BaseProcess, ask: Callable[[], list[float]]) -> dict[str, float]:
    peer.start()
    try:
        times_ms = ask()
    finally:
        peer.terminate()
        peer.join()
    return {f"p{round(share * 100)}_ms": round(percentile(times_ms, share), 2) for share in (0.5, 0.9, 0.99)} | {"n": len(times_ms)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with running_mosquitto(Path(folder) / "stock", is_stock=True) as broker:
            peer = spawn.Process(target=echo_with_paho, args=(broker.port,))
            rows["paho defaults, mosquitto defaults"] = measure(broker, peer, lambda: ask_with_paho(broker.port, given.count))
        with running_mosquitto(Path(folder) / "nodelay") as broker:
            peer = spawn.Process(target=echo_with_paho, args=(broker.port,))
            rows["paho defaults, broker without Nagle"] = measure(broker, peer, lambda: ask_with_paho(broker.port, given.count))
            peer = spawn.Process(target=echo_with_link, args=(broker.port,))
            rows["hotspare link, broker without Nagle"] = measure(broker, peer, lambda: anyio.run(ask_with_link, broker.port, given.count))
            peer = spawn.Process(target=node, args=(broker.port, folder))
            rows["hotspare node, ping journaled with fsync"] = measure(broker, peer, lambda: anyio.run(ask_node, broker.port, given.count))
    print(f"{'round trip, QoS 1 both ways':44} {'p50 ms':>8} {'p90 ms':>8} {'p99 ms':>8} {'n':>6}")
    for name, row in rows.items():
        print(f"{name:44} {row['p50_ms']:8.2f} {row['p90_ms']:8.2f} {row['p99_ms']:8.2f} {row['n']:6}")
    text = json.dumps(rows, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
