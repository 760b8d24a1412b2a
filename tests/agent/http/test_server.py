"""Over a real socket: leaving clients, slow heads, stopping, metrics."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import replace

import anyio
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.http.collaborators import Limits
from agent.http.server import HttpServer, bind
from tests.agent.http.conftest import House

WAIT = {"model": "parrot", "messages": [{"role": "user", "content": "please wait"}]}


def until(condition: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < ends, what
        time.sleep(0.01)


def test_a_stream_whose_client_leaves_is_cancelled(house: House, serve: Callable[[House], str]) -> None:
    url = serve(house)
    with httpx.stream("POST", url + "/v1/chat/completions", json=WAIT | {"stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        assert not house.text.cancelled.is_set()
    until(house.text.cancelled.is_set, "the generation went on after its client had left")


def test_an_answer_whose_client_leaves_is_cancelled(house: House, serve: Callable[[House], str]) -> None:
    url = serve(house)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + "/v1/chat/completions", json=WAIT, timeout=0.5)
    until(house.text.cancelled.is_set, "the generation went on after its client had left")
    until(lambda: sample(url, "hotspare_client_disconnects_total") == 1, "the leaving was not counted")


def test_a_silent_stream_gets_its_head_and_comments(house: House, serve: Callable[[House], str]) -> None:
    house.limits = Limits(head_hold_s=0.1, keep_alive_s=0.1)
    url = serve(house)
    body = {"model": "parrot", "prompt": "wait", "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=5) as answer:
        lines = answer.iter_lines()
        seen = [next(lines) for _ in range(6)]
    assert ": keep-alive" in seen


def test_an_answer_that_takes_too_long_ends(house: House, serve: Callable[[House], str]) -> None:
    house.limits = Limits(answer_s=0.2)
    url = serve(house)
    answer = httpx.post(url + "/v1/chat/completions", json=WAIT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
    streamed = httpx.post(url + "/v1/chat/completions", json=WAIT | {"stream": True})
    assert '"code":"deadline"' in streamed.text
    assert "[DONE]" not in streamed.text


def test_the_picture_stream_ends_with_its_viewer_and_viewers_are_bounded(house: House, serve: Callable[[House], str]) -> None:
    house.limits = Limits(watchers=1)
    url = serve(house) + "/cameras/belt/stream.mjpg"
    with httpx.stream("GET", url) as answer:
        assert answer.headers["content-type"] == "multipart/x-mixed-replace; boundary=hotspare-frame"
        received, chunks = b"", answer.iter_raw()  # held: httpx hangs up when the iterator is collected
        while received.count(house.vision.jpeg) < 2:
            received += next(chunks)
        second = httpx.get(url)
        assert (second.status_code, second.json()["error"]["code"]) == (503, "too_many_viewers")
    until(lambda: house.vision.watching == 0, "the frames went on after the viewer had left")
    with httpx.stream("GET", url) as answer:
        assert answer.status_code == 200


def test_a_head_that_does_not_come_closes_the_connection(house: House, serve: Callable[[House], str]) -> None:
    house.limits = Limits(header_s=0.3)
    host, port = serve(house).removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        assert client.recv(1) == b"", "the server kept a connection without a head"
    with socket.create_connection((host, int(port)), timeout=5) as client:
        for _ in range(2):
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while not received.endswith(b"}"):
                received += client.recv(4096)
            assert received.startswith(b"HTTP/1.1 200")


def test_the_metrics_tell_what_happened(house: House, serve: Callable[[House], str]) -> None:
    url = serve(house)
    httpx.post(url + "/v1/chat/completions", json={"model": "parrot", "messages": [{"role": "user", "content": "a b c"}]})
    house.node.is_open = False
    httpx.post(url + "/v1/chat/completions", json=WAIT)
    httpx.get(url + "/no/such/path")
    chat = "/v1/chat/completions"
    assert sample(url, "hotspare_http_requests_total", endpoint=chat, status="200", method="POST") == 1
    assert sample(url, "hotspare_http_requests_total", endpoint=chat, status="503", method="POST") == 1
    assert sample(url, "hotspare_http_requests_total", endpoint="other", status="404", method="GET") == 1
    assert sample(url, "hotspare_first_token_seconds_count", model="parrot") == 1
    assert sample(url, "hotspare_queue_seconds_sum", model="parrot") == 0.03
    assert sample(url, "hotspare_tokens_total", model="parrot", kind="completion") == 3
    assert sample(url, "hotspare_gate_refusals_total", mode="active") == 1
    assert sample(url, "hotspare_mode", mode="active") == 1
    assert sample(url, "hotspare_lease_left_seconds") == 73
    assert sample(url, "hotspare_worker_restarts", worker="text") == 1
    assert sample(url, "hotspare_pipeline_fps", pipeline="belt") == 12.1
    assert sample(url, "hotspare_pipeline_crossings_total", pipeline="belt", label="parcel") == 120
    assert sample(url, "hotspare_inference_in_flight") == 0
    parrot, *others = house.node.now.models
    slept = replace(parrot, asleep="idle", unloads={"idle": 3, "memory": 1}, reloads=2)
    house.node.now = replace(house.node.now, models=(slept, *others))
    assert sample(url, "hotspare_model_asleep", model="parrot") == 1
    assert sample(url, "hotspare_model_serving", model="parrot", task="generation") == 1, "it answers, a little later"
    assert sample(url, "hotspare_model_unloads_total", model="parrot", reason="idle") == 3
    assert sample(url, "hotspare_model_reloads_total", model="parrot") == 2


def test_only_clients_that_left_count_as_such(house: House, serve: Callable[[House], str]) -> None:
    url = serve(house)
    ask = {"model": "parrot", "messages": [{"role": "user", "content": "a b c"}], "stream": True}
    for _ in range(5):
        assert httpx.post(url + "/v1/chat/completions", json=ask).text.endswith("data: [DONE]\n\n")
    assert sample(url, "hotspare_client_disconnects_total") == 0
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + "/v1/chat/completions", json=WAIT | {"stream": False}, timeout=0.5)
    until(lambda: sample(url, "hotspare_client_disconnects_total") == 1, "the client's leaving was not counted")
    assert sample(url, "hotspare_http_requests_total", endpoint="/v1/chat/completions", status="499", method="POST") == 1


def test_a_stop_does_not_wait_for_viewers_but_lets_an_answer_end(house: House) -> None:
    async def main() -> None:
        app = house.app()
        server = HttpServer(app.asgi, bind("127.0.0.1", 0), stop_s=8, closing=app.closing)
        async with anyio.create_task_group() as tasks, httpx.AsyncClient(base_url=server.url, timeout=10) as client:
            tasks.start_soon(server.run)
            await server.started.wait()
            async with client.stream("GET", "/cameras/belt/stream.mjpg"):
                with anyio.fail_after(4):
                    server.stop()
                    await house.vision.left.wait()
        with pytest.raises(httpx.ConnectError):
            await client_of(server).get("/healthz")

    anyio.run(main)


def test_a_cancelled_server_frees_its_port_and_cancels_its_work(house: House) -> None:
    async def main() -> None:
        server = HttpServer(house.app().asgi, bind("127.0.0.1", 0), stop_s=1)
        async with anyio.create_task_group() as outer:

            async def ask() -> None:
                with contextlib.suppress(httpx.HTTPError):
                    await client_of(server).post("/v1/chat/completions", json=WAIT)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server.run)
                await server.started.wait()
                outer.start_soon(ask)
                with anyio.fail_after(5):
                    await house.text.started.wait()
                tasks.cancel_scope.cancel()
            with anyio.fail_after(5):
                await house.text.cancelled.wait()
        bind("127.0.0.1", server.port).close()

    anyio.run(main)


def client_of(server: HttpServer) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=10)


def test_small_answers_do_not_wait_for_an_acknowledgement(house: House, serve: Callable[[House], str]) -> None:
    house.node.close()
    with httpx.Client(base_url=serve(house)) as client:
        took_s = []
        for _ in range(20):
            started_s = time.monotonic()
            assert client.post("/v1/chat/completions", json=WAIT).status_code == 503
            took_s.append(time.monotonic() - started_s)
    assert min(took_s[1:]) < 0.03, "Nagle's algorithm and delayed acknowledgements cost 40 ms an answer"


def test_an_address_in_use_is_told_with_its_remedy() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(OSError, match=r"change http.host or http.port"):
        bind("127.0.0.1", taken.getsockname()[1])


def sample(url: str, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(httpx.get(url + "/metrics").text):
        for entry in family.samples:
            if entry.name == name and entry.labels == labels:
                return float(entry.value)
    return None
