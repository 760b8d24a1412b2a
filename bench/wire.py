"""HTTP/1.1 over a bare socket, in a process of its own: what a node does, and not what its client needs to notice it.

`python -m bench.wire ask` asks each of some ports in turns on a connection that stays open, as a load balancer's does, and prints what it
saw as JSON; `fill` keeps as many requests in flight as it is told until it is killed. bench/gateway.py starts both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio

PATH = "/v1/chat/completions"
PATIENCE_S = 120.0
REFUSED_PAUSE_S = 0.2  # of a filler that is told to come back


@dataclass(frozen=True)
class Answer:
    """`first_ms`: until the first bytes of the body; `all_ms`: until its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    first_ms: float
    all_ms: float


class Wire:
    """One connection; opened again when the other side has closed it between two requests."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None

    def post(self, body: Mapping[str, Any], patience_s: float = PATIENCE_S) -> Answer:
        """Raises OSError, EOFError. `patience_s`: how long the node is told that its client waits."""
        data = json.dumps(body).encode()
        fields = ("Host: bench", "Content-Type: application/json", f"X-Request-Timeout: {patience_s:g}", f"Content-Length: {len(data)}")
        head = "\r\n".join((f"POST {PATH} HTTP/1.1", *fields, "", ""))
        for _ in range(2):
            link, self._socket = self._socket or self._connect(), None
            try:
                answer = self._exchange(link, head.encode() + data)
            except (ConnectionError, EOFError):
                link.close()
                continue
            self._socket = link
            return answer
        raise EOFError(f"port {self._port} closes connections without an answer")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _connect(self) -> socket.socket:
        link = socket.create_connection(("127.0.0.1", self._port), PATIENCE_S)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return link

    def _exchange(self, link: socket.socket, request: bytes) -> Answer:
        began_s = time.perf_counter()
        link.sendall(request)
        data = b""
        while b"\r\n\r\n" not in data:
            data += _some(link)
        head, _, body = data.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers["content-length"]) if "content-length" in headers else None
        first_s = time.perf_counter() if body else 0.0
        while len(body) < length if length is not None else not body.endswith(b"0\r\n\r\n"):
            body += _some(link)
            first_s = first_s or time.perf_counter()
        ended_s = time.perf_counter()
        return Answer(int(status.split(" ")[1]), headers, body, 1000 * ((first_s or ended_s) - began_s), 1000 * (ended_s - began_s))


def _some(link: socket.socket) -> bytes:
    data = link.recv(1 << 16)
    if not data:
        raise EOFError
    return data


def in_turns(
    ports: Mapping[str, int], bodies: Sequence[Mapping[str, Any]], turns: int, pause_s: float = 0.0, patience_s: float = PATIENCE_S
) -> dict[str, list[dict[str, Any]]]:
    """What each port answered to each of `turns` requests, one after another."""
    wires = {name: Wire(port) for name, port in ports.items()}
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in ports}
    for turn in range(turns):
        for name, wire in wires.items():
            answer = wire.post(bodies[turn % len(bodies)], patience_s)
            told = {key: answer.headers.get(key, "") for key in ("x-hotspare-cache", "x-hotspare-backend", "retry-after")}
            seen[name].append({"status": answer.status, "first_ms": answer.first_ms, "all_ms": answer.all_ms, **told})
            time.sleep(pause_s)
    for wire in wires.values():
        wire.close()
    return seen


def many(port: int, bodies: Sequence[Mapping[str, Any]], clients: int, seconds: float) -> dict[str, Any]:
    """Answers a second of `clients` at once, each asking all of `bodies` in turn, and what they say of the cache."""
    ends_s = time.monotonic() + seconds
    seen: Counter[str] = Counter()
    lock = threading.Lock()

    def ask(begin: int) -> None:
        place = begin
        with contextlib.closing(Wire(port)) as wire:
            while time.monotonic() < ends_s:
                answer = wire.post(bodies[place % len(bodies)])
                place += 1
                with lock:
                    seen[answer.headers.get("x-hotspare-cache") or str(answer.status)] += 1

    _threads(clients, lambda number: ask(7 * number))
    return {"answers_per_s": seen.total() / seconds, "seen": dict(seen)}


def fill(port: int, body: Mapping[str, Any], clients: int) -> None:
    """Keep `clients` requests in flight, for ever. Who is told to come back does, a little later."""

    def ask(_: int) -> None:
        wire = Wire(port)
        while True:
            if wire.post(body).status != 200:
                time.sleep(REFUSED_PAUSE_S)

    _threads(clients, ask)


def _threads(count: int, work: Any) -> None:
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def asked(way: str, **order: Any) -> Any:
    """What `in_turns` (way `ask`) or `many` gives in a process of its own."""
    done = await anyio.run_process([sys.executable, "-m", "bench.wire", way], input=json.dumps(order).encode(), stderr=None)
    return json.loads(done.stdout)


@asynccontextmanager
async def filled(port: int, body: Mapping[str, Any], clients: int) -> AsyncIterator[None]:
    """While `clients` requests are kept in flight by another process."""
    async with await anyio.open_process([sys.executable, "-m", "bench.wire", "fill"], stdout=None, stderr=None) as process:
        if process.stdin is None:
            raise RuntimeError("a process without stdin")
        await process.stdin.send(json.dumps({"port": port, "body": body, "clients": clients}).encode())
        await process.stdin.aclose()
        try:
            yield
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=("ask", "many", "fill"), help="what to do with the order, which is read as JSON from stdin")
    way = parser.parse_args().way
    order = json.load(sys.stdin)
    if way == "fill":
        fill(**order)
    else:
        json.dump(in_turns(**order) if way == "ask" else many(**order), sys.stdout)


if __name__ == "__main__":
    main()
