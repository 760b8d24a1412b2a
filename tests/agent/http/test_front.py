"""The door: gate, keys, limits, errors of the framework, the in-flight count."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import get_args

import anyio
import httpx
import pytest

from agent.errors import WorkerLost, WorkerRefused
from agent.http.collaborators import Limits
from agent.http.keys import KeyRules
from agent.http.reasons import WORDS
from agent.mode import Reason
from agent.supervision.exit_cause import ExitCause
from tests.agent.http.conftest import House

pytestmark = pytest.mark.anyio
ASK = {"model": "parrot", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("path", ["chat/completions", "completions", "embeddings", "batch", "classify", "detect"])
@pytest.mark.parametrize("prefix", ["/v1/", "/"])
async def test_a_closed_gate_refuses_before_the_body_is_looked_at(client: httpx.AsyncClient, house: House, prefix: str, path: str) -> None:
    house.node.close("draining")
    answer = await client.post(prefix + path, content=b"not even JSON")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "12"
    assert answer.headers["X-Hotspare-Mode"] == "draining"
    assert answer.json()["error"]["code"] == "not_serving"


@pytest.mark.parametrize("path", ["/", "/healthz", "/livez", "/metrics", "/v1/models", "/node", "/cameras", "/cameras/belt"])
async def test_a_closed_gate_leaves_the_rest_open(client: httpx.AsyncClient, house: House, path: str) -> None:
    house.node.close()
    assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/readyz"])
async def test_balancers_may_probe_with_head(client: httpx.AsyncClient, house: House, path: str) -> None:
    assert (await client.head(path)).status_code == 200
    house.node.close()
    assert (await client.head(path)).status_code == (503 if path == "/readyz" else 200)


async def test_every_reason_of_the_mode_machine_has_words() -> None:
    assert set(WORDS) == set(get_args(Reason))


async def test_what_services_raise_has_a_status(client: httpx.AsyncClient, house: House) -> None:
    lost = WorkerLost("text", ExitCause("segfault", "killed by SIGSEGV"))
    for error, status, code in (
        (WorkerRefused("busy", "the queue is full"), 429, "busy"),
        (WorkerRefused("deadline", "took too long"), 504, "deadline"),
        (WorkerRefused("engine", "out of memory"), 500, "internal_error"),
        (lost, 503, "worker_lost"),
    ):
        house.text.failure = error
        for stream in (False, True):
            answer = await client.post("/v1/chat/completions", json=ASK | {"stream": stream})
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_readiness_says_why_not(client: httpx.AsyncClient, house: House) -> None:
    assert (await client.get("/readyz")).json()["status"] == "ready"
    house.node.close()
    answer = await client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["reasons"] == ["mode standby: it holds no lease; the coordinator gives it one when the primary fails"]


async def test_errors_of_the_framework_have_openais_shape(client: httpx.AsyncClient) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405)):
        answer = await client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_long_body_is_refused_by_its_announcement_and_by_its_bytes(house: House) -> None:
    house.limits = Limits(json_bytes=1000)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b" " * 100

    async with httpx.AsyncClient(transport=httpx.ASGITransport(house.app().asgi), base_url="http://node") as client:
        announced = await client.post("/v1/chat/completions", content=b" " * 2000, headers={"content-type": "application/json"})
        chunked = await client.post("/v1/chat/completions", content=chunks(), headers={"content-type": "application/json"})
    for answer in (announced, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


async def test_a_slow_body_is_given_up(house: House) -> None:
    house.limits = Limits(body_s=0.1)

    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        await anyio.sleep_forever()

    async with httpx.AsyncClient(transport=httpx.ASGITransport(house.app().asgi), base_url="http://node") as client:
        with anyio.fail_after(5):
            answer = await client.post("/v1/chat/completions", content=never(), headers={"content-type": "application/json"})
    assert answer.status_code == 408


async def test_keys_are_asked_for_where_there_are_any(house: House) -> None:
    house.keys = {hashlib.sha256(key).digest(): KeyRules() for key in (b"other", b"sesame")}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(house.app().asgi), base_url="http://node") as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/")).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}):
            answer = await client.post("/v1/chat/completions", json=ASK, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert (await client.get("/node", headers=headers)).status_code == 401
        for headers in ({"Authorization": "Bearer sesame"}, {"X-Api-Key": "sesame"}):
            assert (await client.post("/v1/chat/completions", json=ASK, headers=headers)).status_code == 200


async def test_in_flight_counts_streams_until_their_end_and_bounds_them(house: House) -> None:
    house.limits = Limits(in_flight=1)
    app = house.app()
    waiting = {"model": "parrot", "messages": [{"role": "user", "content": "wait"}]}
    async with (
        httpx.AsyncClient(transport=httpx.ASGITransport(app.asgi), base_url="http://node") as client,
        anyio.create_task_group() as tasks,
    ):
        assert await app.in_flight.wait_idle(0.1)

        async def ask() -> None:
            await client.post("/v1/chat/completions", json=waiting)

        tasks.start_soon(ask)
        with anyio.fail_after(5):
            await house.text.started.wait()
        assert app.in_flight.count == 1
        assert not await app.in_flight.wait_idle(0.05)
        answer = await client.post("/v1/chat/completions", json=ASK)
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
        tasks.cancel_scope.cancel()
    assert await app.in_flight.wait_idle(5)


@pytest.mark.parametrize(("words", "is_good"), [("all is well", True), ("to fall over", False), ("boom", False)])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_stream_that_ends_with_an_error_is_no_good_answer(
    client: httpx.AsyncClient, house: House, words: str, is_good: bool, stream: bool
) -> None:
    answer = await client.post("/v1/chat/completions", json={**ASK, "messages": [{"role": "user", "content": words}], "stream": stream})
    assert answer.status_code == (200 if is_good or (stream and words != "boom") else 503)
    assert [outcome.is_good for outcome in house.outcomes] == [is_good]


async def test_the_demo_switch(client: httpx.AsyncClient, house: House) -> None:
    assert (await client.get("/node")).json()["demo"] == {"primary_is_on": True}
    assert (await client.post("/demo/primary", json={"on": False})).json() == {"primary_is_on": False}
    assert house.demo.on is False
    form = await client.post("/demo/primary", content='{"on": true}', headers={"content-type": "text/plain"})
    assert form.status_code == 400, "a page of another origin can send text/plain without asking"
    assert house.demo.on is False
