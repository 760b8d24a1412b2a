"""The bare client of the gateway's bench reads HTTP as it comes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bench.wire import Wire, asked, in_turns, many

pytestmark = pytest.mark.anyio


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(asked["status"])
        self.send_header("x-hotspare-cache", asked["cache"])
        if asked["stream"]:
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for piece in (b"data: {}\n\n", b"data: [DONE]\n\n"):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.send_header("content-length", "10")
            self.end_headers()
            self.wfile.write(b"0123456789")
        self.close_connection = asked.get("leave", False)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  # its name in the base
        """Nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


BODY = {"status": 200, "cache": "hit", "stream": False}


def test_whole_and_streamed_answers_on_one_connection_and_after_it_was_closed(port: int) -> None:
    with closing(Wire(port)) as wire:
        for body in (BODY, {**BODY, "stream": True}, {**BODY, "leave": True}, {**BODY, "status": 429}):
            answer = wire.post(body)
            assert (answer.status, answer.headers["x-hotspare-cache"]) == (body["status"], "hit")
            assert answer.body == b"0123456789" if not body["stream"] else answer.body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert 0 < answer.first_ms <= answer.all_ms


def test_who_asks_in_turns_and_who_asks_at_once(port: int) -> None:
    seen = in_turns({"a": port, "b": port}, [BODY, {**BODY, "status": 429}], 4)
    assert {way: [one["status"] for one in answers] for way, answers in seen.items()} == {"a": [200, 429] * 2, "b": [200, 429] * 2}
    told = many(port, [BODY, {**BODY, "cache": "miss"}], 2, 0.2)
    assert set(told["seen"]) == {"hit", "miss"}


async def test_a_process_of_its_own_asks(port: int) -> None:
    seen = await asked("ask", ports={"a": port}, bodies=[BODY], turns=2)
    assert [one["x-hotspare-cache"] for one in seen["a"]] == ["hit", "hit"]
