"""The gateway against primaries that fail in every way; clients see whole answers."""

from __future__ import annotations

import hashlib
import json
import ssl
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import httpx
import openai
import pytest
from anyio.streams.tls import TLSListener

from agent.gateway.breaker import Closed, HalfOpen, Open
from agent.gateway.forward import Budgets
from agent.http.collaborators import Limits, ServiceFailure
from agent.http.keys import KeyRules
from tests.agent.gateway import primaries
from tests.agent.gateway.conftest import LOCAL, House, Setup
from tests.agent.gateway.primaries import WORDS, Call, cut_at, stall_after, status, stream_bytes, well

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

ASKED: dict[str, Any] = {"model": "deepseek-chat", "messages": [{"role": "user", "content": "hi"}]}
CLOUD_TEXT, LOCAL_TEXT = "".join(WORDS), "".join(LOCAL)
NO_LIMIT = httpx.Limits(max_connections=None)


async def streamed(house: House, **more: Any) -> tuple[str, str | None, str]:
    """(text, finish reason, header) as the unmodified client sees a stream."""
    text, finish = "", None
    async with house.openai.chat.completions.with_streaming_response.create(**ASKED, **more, stream=True) as answer:
        backend = answer.headers["x-hotspare-backend"]
        async for chunk in await answer.parse():
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
    return text, finish, backend


async def until(holds: Any, what: str) -> None:
    with anyio.move_on_after(30.0):
        while True:
            if holds():
                return
            await anyio.sleep(0.01)
    raise AssertionError(what)


async def test_bytes_of_a_well_primary_pass_untouched(setup: Setup) -> None:
    async with setup.running() as house:
        answer = await house.client.post(
            "/v1/chat/completions", json={**ASKED, "stream": True}, headers={"x-mine": "1", "connection": "x-hop", "x-hop": "2"}
        )
        assert answer.content == b"".join(stream_bytes(model="deepseek-chat"))
        assert answer.headers["x-hotspare-backend"] == "primary"
        assert answer.headers["x-request-id"] == "cloud-1"
        whole = await house.client.post("/chat/completions?beta=1", json=ASKED)
        assert whole.content == primaries.whole_bytes(model="deepseek-chat")
        sent = setup.cloud.calls
        assert sent[0].headers["authorization"] == "Bearer cloud-key"
        assert sent[0].headers["x-mine"] == "1"
        assert "x-hop" not in sent[0].headers
        assert sent[1].path == "/chat/completions?beta=1"
        await until(lambda: setup.outcomes, "an outcome")
        assert [outcome.backend for outcome in setup.outcomes] == ["primary", "primary"]
        assert all(outcome.is_good and outcome.cloud_calls == 1 for outcome in setup.outcomes)


async def test_a_connection_to_the_primary_serves_one_stream_after_another(setup: Setup) -> None:
    async def stays_open(call: Call) -> None:
        await call.begin_stream()
        for item in stream_bytes():
            await call.part(item)

    async with setup.running(probes=False) as house:
        for _ in range(50):  # a client may ask again before the last bytes are read, and then gets another connection
            answer = await house.client.post("/v1/chat/completions", json={**ASKED, "stream": True})
            assert answer.text.endswith("data: [DONE]\n\n")
            if len({id(call.socket) for call in setup.cloud.calls}) < len(setup.cloud.calls):
                break
        else:
            pytest.fail("each stream had a connection of its own")
        setup.cloud.behave = stays_open
        for _ in range(2):
            answer = await house.client.post("/v1/chat/completions", json={**ASKED, "stream": True})
            assert answer.text.endswith("data: [DONE]\n\n"), "whole for the client, who need not wait for the end of the connection"
            with anyio.fail_after(30.0):
                await setup.cloud.left.wait()
            setup.cloud.left = anyio.Event()
        assert setup.cloud.calls[-1].socket is not setup.cloud.calls[-2].socket


async def test_events_that_come_together_are_judged_one_by_one(setup: Setup) -> None:
    async def at_once(call: Call) -> None:
        await call.begin_stream()
        await call.part(b"".join(stream_bytes()[:4]) + b'data: {"error": {"message": "no", "code": "overloaded"}}\n\n')
        await call.end_stream()

    setup.cloud.behave = at_once
    async with setup.running() as house:
        answer = await house.client.post("/v1/chat/completions", json={**ASKED, "stream": True})
        assert answer.content.startswith(b"".join(stream_bytes()[:4]))
        assert b"overloaded" not in answer.content
        assert answer.text.endswith("data: [DONE]\n\n")
        assert [outcome.backend for outcome in setup.outcomes] == ["continued"]


async def test_without_a_key_of_its_own_the_clients_key_passes(setup: Setup) -> None:
    setup.key = ""
    async with setup.running() as house:
        await house.openai.chat.completions.create(**ASKED)
        assert setup.cloud.calls[0].headers["authorization"] == "Bearer client-key"
        setup.cloud.behave = status(401)
        with pytest.raises(openai.AuthenticationError):
            await house.openai.chat.completions.create(**ASKED)
        setup.cloud.behave = status(402)
        for _ in range(5):
            assert (await house.openai.chat.completions.create(**ASKED)).choices[0].message.content == LOCAL_TEXT
        assert isinstance(house.primary.state, Closed), "one client's empty account says nothing of the primary"


FAILURES = {
    "close": primaries.close,
    "hang before the head": primaries.hang,
    "hang after the head": primaries.head_then_hang,
    "comments only": primaries.comments_only,
    "garbage": primaries.garbage,
    "garbage events": primaries.garbage_events,
    "a page": primaries.page_instead,
    "slow loris": primaries.slow_loris,
    "401": status(401), "402": status(402), "429": status(429), "429 with Retry-After": status(429, "retry-after: 7\r\n"),
    "500": status(500), "503": status(503), "529": status(529), "redirect": status(302, "location: /elsewhere\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_no_failure_before_the_first_token_reaches_a_client(setup: Setup, failure: str, stream: bool) -> None:
    setup.cloud.behave = setup.cloud.probed = FAILURES[failure]
    async with setup.running(probes=False) as house:
        started_s = anyio.current_time()
        if stream:
            assert await streamed(house) == (LOCAL_TEXT, "stop", "local")
        else:
            raw = await house.openai.chat.completions.with_raw_response.create(**ASKED)
            assert raw.parse().choices[0].message.content == LOCAL_TEXT
            assert raw.headers["x-hotspare-backend"] == "local"
        assert anyio.current_time() - started_s < 1.5, "within the budget"
        await until(lambda: setup.outcomes, "an outcome")
        assert setup.outcomes[0].backend == "local"
        assert setup.outcomes[0].is_good
        assert setup.outcomes[0].cause != ""


async def test_a_refused_connection_is_answered_here(setup: Setup) -> None:
    setup.url = "http://127.0.0.1:1"
    async with setup.running(probes=False) as house:
        for _ in range(4):
            assert await streamed(house) == (LOCAL_TEXT, "stop", "local")
        assert isinstance(house.primary.state, Open)
        await until(lambda: setup.outcomes, "an outcome")
        assert setup.outcomes[-1].cloud_calls == 0, "open: it is not even asked"


@pytest.mark.parametrize("is_plain", [True, False], ids=["no TLS at all", "a certificate of nobody"])
async def test_a_tls_failure_is_answered_here_and_opens_at_once(setup: Setup, tmp_path: Path, is_plain: bool) -> None:
    async def speak(stream: anyio.abc.ByteStream) -> None:
        async with stream:
            await stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    listener: anyio.abc.Listener[Any] = await anyio.create_tcp_listener(local_host="127.0.0.1")
    setup.url = f"https://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
    if not is_plain:
        listener = TLSListener(listener, self_signed(tmp_path), standard_compatible=False)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, speak)
        async with setup.running(probes=False) as house:
            assert await streamed(house) == (LOCAL_TEXT, "stop", "local")
            assert isinstance(house.primary.state, Open)
            assert house.primary.state.cause.kind == "tls"
        tasks.cancel_scope.cancel()


def self_signed(folder: Path) -> ssl.SSLContext:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


@pytest.mark.parametrize("code", [400, 404, 413, 422])
async def test_the_clients_own_faults_pass_and_are_asked_once(setup: Setup, code: int) -> None:
    setup.policy = replace(setup.policy, budgets=Budgets())
    setup.cloud.behave = status(code)
    async with setup.running(probes=False) as house:
        for stream in (True, False):
            with pytest.raises(openai.APIStatusError) as refused:
                await house.openai.chat.completions.create(**ASKED, stream=stream)
            assert refused.value.status_code == code
        assert len(setup.cloud.calls) == 2
        assert setup.text.asked == 0
        assert isinstance(house.primary.state, Closed)


async def test_a_quick_failure_is_tried_once_more_within_the_budget(setup: Setup) -> None:
    async def second_time(call: Call) -> None:
        await (well if len(setup.cloud.calls) % 2 == 0 else status(503))(call)

    setup.cloud.behave = second_time
    async with setup.running(probes=False) as house:
        assert await streamed(house) == (CLOUD_TEXT, "stop", "primary")
        await until(lambda: setup.outcomes, "an outcome")
        assert (len(setup.cloud.calls), setup.outcomes[0].cloud_calls) == (2, 2)
        assert await streamed(house) == (LOCAL_TEXT, "stop", "local"), "the budget of retries is used up"
        assert len(setup.cloud.calls) == 3


async def test_the_breaker_opens_probes_and_closes(setup: Setup) -> None:
    setup.cloud.behave = setup.cloud.probed = status(503)
    async with setup.running() as house:
        while isinstance(house.primary.state, Closed):
            assert (await streamed(house))[0] == LOCAL_TEXT
        asked = len(setup.cloud.calls)
        for _ in range(5):
            assert await streamed(house) == (LOCAL_TEXT, "stop", "local")
        assert len(setup.cloud.calls) == asked, "no client is used to try an ill primary"
        setup.cloud.behave = setup.cloud.probed = well
        await until(lambda: isinstance(house.primary.state, Closed), "closed again")
        assert setup.states[0] == "Open"
        assert setup.states[-2:] == ["HalfOpen", "Closed"]
        assert HalfOpen.__name__ in setup.states
        assert await streamed(house) == (CLOUD_TEXT, "stop", "primary")


async def test_probes_alone_find_an_outage(setup: Setup) -> None:
    setup.cloud.probed = status(402)
    async with setup.running() as house:
        await until(lambda: isinstance(house.primary.state, Open), "open")
        assert await streamed(house) == (LOCAL_TEXT, "stop", "local")
        assert not setup.cloud.calls


EVENTS = b"".join(stream_bytes(model="deepseek-chat"))


@pytest.mark.parametrize("byte", sorted({round(index * len(EVENTS) / 50) for index in range(51)} - {len(EVENTS)}))
async def test_a_stream_cut_anywhere_is_complete_all_the_same(setup: Setup, byte: int) -> None:
    setup.cloud.behave = cut_at(byte)
    async with setup.running(probes=False) as house:
        text, finish, backend = await streamed(house)
    begun = setup.text.begun
    assert finish == "stop"
    if begun is None:
        assert text in (LOCAL_TEXT, CLOUD_TEXT), "all of one, or all of the other and only the end was missing"
    else:
        assert text == begun + " <0> <1> <2>"
        assert CLOUD_TEXT.startswith(begun)
        assert backend == "primary", "the head was sent before"
        await until(lambda: setup.outcomes, "an outcome")
        assert setup.outcomes[0].backend == "continued"
        assert setup.outcomes[0].is_good


async def test_a_continued_stream_keeps_its_names_and_says_what_happened(setup: Setup) -> None:
    setup.cloud.behave = cut_at(len(b"".join(stream_bytes(model="deepseek-chat")[:4])) + 9, usage=True)
    async with setup.running(probes=False) as house:
        more = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5}
        answer = await house.client.post("/v1/chat/completions", json={**ASKED, **more})
        lines = answer.text.split("\n\n")
        assert [line for line in lines if line.startswith(":")] == [
            ": hotspare: it broke off in the middle of an answer; the answer goes on from the local model"
        ]
        chunks = [chunk_of(line) for line in lines if line.startswith("data: {")]
        assert {(chunk["id"], chunk["model"], chunk["created"], chunk["system_fingerprint"]) for chunk in chunks} == {
            ("chatcmpl-cloud", "deepseek-chat", 1700000000, "fp_1")
        }
        assert setup.text.begun == "The capital of"
        assert setup.text.last is not None
        assert setup.text.last.max_tokens == 2, "three of five words were said"
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        assert chunks[-2]["hotspare"] == {"backend": "continued", "cause": "cut", "from_character": 14}
        assert chunks[-1]["usage"]["completion_tokens"] == 5
        assert lines[-2:] == ["data: [DONE]", ""]


def chunk_of(line: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return values


async def test_a_stalled_stream_goes_on_too_though_comments_come(setup: Setup) -> None:
    setup.cloud.behave = stall_after(3)
    async with setup.running(probes=False) as house:
        text, finish, _ = await streamed(house)
        assert (text, finish) == ("The capital <0> <1> <2>", "stop")
        await until(lambda: setup.outcomes, "an outcome")
        assert setup.outcomes[0].cause == "stalled"


async def test_an_error_event_in_the_middle_counts_as_a_cut(setup: Setup) -> None:
    async def fail(call: Call) -> None:
        await call.begin_stream()
        await call.part(b"".join(stream_bytes(model="deepseek-chat")[:2]) + b'data: {"error":{"message":"oops","type":"server_error"}}\n\n')
        await call.end_stream()

    setup.cloud.behave = fail
    async with setup.running(probes=False) as house:
        assert (await streamed(house))[:2] == ("The <0> <1> <2>", "stop")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"response_format": {"type": "json_object"}}, "form 'json_object'"),
        ({"extra_body": {"structured_outputs": {"choice": ["a", "b"]}}}, "its form"),
        ({"n": 2}, "several choices"),
        ({"logprobs": True}, "probabilities"),
    ],
)
async def test_what_cannot_be_gone_on_with_ends_in_an_honest_error(setup: Setup, more: dict[str, Any], words: str) -> None:
    setup.cloud.behave = cut_at(len(EVENTS) // 2)
    async with setup.running(probes=False) as house:
        with pytest.raises(openai.APIError, match=words):
            await streamed(house, **more)
        await until(lambda: setup.outcomes, "an outcome")
        assert not setup.outcomes[0].is_good


async def test_continuing_can_be_switched_off_and_may_fail(setup: Setup) -> None:
    setup.cloud.behave = cut_at(len(EVENTS) // 2)
    setup.text.failure = ServiceFailure("busy", "all slots are taken")
    async with setup.running(probes=False) as house:
        with pytest.raises(openai.APIError, match="all slots are taken"):
            await streamed(house)
    setup.policy = replace(setup.policy, continues=False)
    async with setup.running(probes=False) as house:
        with pytest.raises(openai.APIError, match="set not to go on"):
            await streamed(house)


async def test_the_clients_leaving_ends_the_request_at_the_primary(setup: Setup) -> None:
    async def slowly(call: Call) -> None:
        await call.begin_stream()
        await call.part(b"".join(stream_bytes()[:2]))
        await primaries.hang(call)

    setup.cloud.behave = slowly
    patient = replace(setup.policy.budgets, first_byte_s=5.0, first_token_s=5.0, between_tokens_s=30.0)
    setup.policy = replace(setup.policy, budgets=patient)
    async with setup.running(probes=False) as house:
        async with house.client.stream("POST", "/v1/chat/completions", json={**ASKED, "stream": True}) as answer:
            async for _ in answer.aiter_raw():
                break
        with anyio.fail_after(5):
            await setup.cloud.left.wait()
        assert setup.text.asked == 0


async def test_hedged_the_first_token_wins(setup: Setup) -> None:
    setup.policy = replace(setup.policy, hedge_s=0.05, budgets=replace(setup.policy.budgets, first_byte_s=5.0, first_token_s=5.0))
    setup.cloud.behave = primaries.comments_only
    async with setup.running(probes=False) as house:
        started_s = anyio.current_time()
        assert await streamed(house) == (LOCAL_TEXT, "stop", "local")
        assert (await house.openai.chat.completions.create(**ASKED)).choices[0].message.content == LOCAL_TEXT
        assert anyio.current_time() - started_s < 2.0
        await until(lambda: setup.outcomes, "an outcome")
        assert setup.outcomes[0].cause == "slower"
        with anyio.fail_after(5):
            await setup.cloud.left.wait()

        async def soon(call: Call) -> None:
            await anyio.sleep(0.2)
            await well(call)

        setup.cloud.behave, setup.text.pace_s = soon, 0.0
        setup.text.failure = ServiceFailure("busy", "all slots are taken")
        assert await streamed(house) == (CLOUD_TEXT, "stop", "primary"), "a local refusal is no answer to a race"


async def test_a_long_whole_answer_is_waited_for_while_probes_are_answered(setup: Setup) -> None:
    async def late(call: Call) -> None:
        await anyio.sleep(1.0)
        await well(call)

    setup.cloud.behave = late
    async with setup.running(probes=False) as house:
        assert (await house.openai.chat.completions.create(**ASKED)).choices[0].message.content == CLOUD_TEXT
        assert setup.cloud.probes >= 1


async def test_a_slow_client_is_not_taken_for_a_stalled_primary(setup: Setup) -> None:
    words = [f" {index:x>4000}" for index in range(400)]

    async def much(call: Call) -> None:
        await call.begin_stream()
        for event in stream_bytes(words, model="deepseek-chat"):
            await call.part(event)
        await call.end_stream()

    setup.cloud.behave = much
    patient = replace(setup.policy.budgets, first_byte_s=1.0, first_token_s=1.0, between_tokens_s=1.0)
    setup.policy = replace(setup.policy, budgets=patient)
    async with setup.running(probes=False) as house:
        text = b""
        async with house.client.stream("POST", "/v1/chat/completions", json={**ASKED, "stream": True}) as answer:
            await anyio.sleep(1.5)  # over all budgets; the buffers between hold less than the answer
            async for piece in answer.aiter_raw():
                text += piece
        assert text == b"".join(stream_bytes(words, model="deepseek-chat"))
        assert setup.text.asked == 0


async def test_the_loser_of_a_race_is_left_at_once(setup: Setup) -> None:
    setup.policy = replace(setup.policy, hedge_s=0.05, budgets=replace(setup.policy.budgets, first_byte_s=9.0, first_token_s=9.0))
    setup.cloud.behave, setup.text.pace_s = primaries.head_then_hang, 1.0
    asked = {**ASKED, "stream": True}
    async with setup.running(probes=False) as house, house.client.stream("POST", "/v1/chat/completions", json=asked) as answer:
        assert answer.headers["x-hotspare-backend"] == "local"
        with anyio.fail_after(0.8):
            await setup.cloud.left.wait()


async def test_names_are_translated_both_ways(setup: Setup) -> None:
    setup.policy = replace(setup.policy, rename={"deepseek-chat": "deepseek-v4-flash"})
    async with setup.running(probes=False) as house:
        answer = await house.openai.chat.completions.create(**ASKED)
        assert setup.cloud.calls[0].fields["model"] == "deepseek-v4-flash"
        assert (answer.model, answer.choices[0].message.content) == ("deepseek-chat", CLOUD_TEXT)
        stream = await house.openai.chat.completions.create(**ASKED, stream=True)
        assert {chunk.model async for chunk in stream} == {"deepseek-chat"}


async def test_own_models_are_answered_here_and_foreign_vectors_nowhere_else(setup: Setup) -> None:
    async with setup.running(probes=False) as house:
        own = await house.openai.chat.completions.create(**{**ASKED, "model": "parrot"})
        assert own.choices[0].message.content == LOCAL_TEXT
        assert not setup.cloud.calls
        assert (await house.openai.embeddings.create(model="cloud-e", input="x", encoding_format="float")).data[0].embedding == [0.25]
        setup.cloud.behave = status(503)
        with pytest.raises(openai.InternalServerError, match="embeddings"):
            await house.openai.embeddings.create(model="cloud-e", input="x")


async def test_what_only_the_primary_can_do_is_503_and_not_the_clients_fault(setup: Setup) -> None:
    setup.cloud.behave = status(503)
    async with setup.running(probes=False) as house:
        with pytest.raises(openai.InternalServerError, match="cannot stand in: modalities") as refused:
            await house.openai.chat.completions.create(**ASKED, modalities=["audio"])
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) >= 1
        bare = await house.client.post("/chat/completions", json={**ASKED, "modalities": ["audio"]})
        assert (bare.status_code, bare.json()["error"]["code"]) == (503, "primary_unavailable"), "at DeepSeek's base, too"
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await house.openai.chat.completions.create(**ASKED, temperature=-1)


async def test_other_paths_pass_and_the_nodes_own_stay(setup: Setup) -> None:
    async def echo(call: Call) -> None:
        await call.answer(200, b"<" + call.body + b">", "text/plain")

    setup.cloud.behave = echo
    async with setup.running(probes=False) as house:
        answer = await house.client.post("/v1/audio/speech?x=1", content=b"abc")
        assert (answer.text, answer.headers["x-hotspare-backend"]) == ("<abc>", "primary")
        assert (await house.client.get("/user/balance")).text == "<>"
        assert (await house.client.get("/v1/models")).json()["object"] == "list"
        for path in ("/v1/files", "/v1/files/file-1/content", "/v1/batches", "/batches/batch_1"):  # this node keeps none here, and says so
            assert "this node keeps no files" in (await house.client.get(path)).text
        assert len(setup.cloud.calls) == 2
        setup.cloud.behave = primaries.close
        gone = await house.client.get("/user/balance")
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "primary_unavailable")
        assert (await house.client.get("/v1/../etc/passwd")).status_code == 404


async def test_what_is_forwarded_does_not_count_against_the_work_of_this_node(setup: Setup) -> None:
    """64 streams of the primary at once, on a node that answers two itself."""
    go_on, many = anyio.Event(), 64

    async def held(call: Call) -> None:
        await call.begin_stream()
        events = stream_bytes(model=str(call.fields["model"]))
        await call.part(b"".join(events[:3]))
        await go_on.wait()
        await call.part(b"".join(events[3:]))
        await call.end_stream()

    setup.cloud.behave = held
    setup.policy = replace(setup.policy, budgets=Budgets(between_tokens_s=60.0, first_byte_s=60.0, first_token_s=60.0))
    setup.limits, setup.text.pace_s = Limits(in_flight=2, forwarded=many), 1.0
    texts: list[str] = []
    async with setup.running(probes=False) as house, httpx.AsyncClient(timeout=60.0, limits=NO_LIMIT, trust_env=False) as client:
        url = f"{house.client.base_url}/v1/chat/completions"

        async def one() -> None:
            texts.append((await client.post(url, json={**ASKED, "stream": True})).text)

        async def local() -> None:
            assert (await client.post(url, json={**ASKED, "model": "parrot"})).status_code == 200

        async with anyio.create_task_group() as tasks:
            for _ in range(many):
                tasks.start_soon(one)
            await until(lambda: len(setup.cloud.calls) == many, "all of them at the primary")
            more = await client.post(url, json=ASKED)
            assert (more.status_code, more.json()["error"]["code"]) == (429, "busy")
            assert int(more.headers["retry-after"]) >= 1
            go_on.set()
        assert texts == [b"".join(stream_bytes(model="deepseek-chat")).decode()] * many

        setup.cloud.behave = well
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(local)
            await until(lambda: setup.text.asked == 2, "two answers in the making")
            assert (await client.post(url, json={**ASKED, "model": "parrot"})).status_code == 429, "a third one of its own"
            assert (await client.post(url, json=ASKED)).status_code == 200, "the primary's are none of these"


def response_events(words: Sequence[str] = WORDS) -> list[bytes]:
    """A streamed answer of the Responses API, as far as the gateway and the client look at it."""
    response: dict[str, Any] = {
        "id": "resp_cloud",
        "object": "response",
        "status": "in_progress",
        "model": "cloud-1",
        "output": [],
        "error": None,
    }
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    events: list[dict[str, Any]] = [{"type": "response.created", "response": response}]
    events += [{"type": "response.output_text.delta", **place, "delta": word, "logprobs": []} for word in words]
    events.append({"type": "response.completed", "response": {**response, "status": "completed"}})
    lines = [json.dumps({**item, "sequence_number": number}).encode() for number, item in enumerate(events)]
    return [b"event: " + item["type"].encode() + b"\ndata: " + line + b"\n\n" for item, line in zip(events, lines, strict=True)]


async def spoken(house: House) -> str:
    stream = await house.openai.responses.create(model="deepseek-chat", input="hi", stream=True)
    return "".join([item.delta async for item in stream if item.type == "response.output_text.delta"])


async def test_responses_go_to_the_primary_and_are_answered_here_until_their_first_word(setup: Setup) -> None:
    setup.policy = replace(setup.policy, budgets=Budgets())

    async def answers(call: Call) -> None:
        assert call.path == "/v1/responses"
        if not call.fields.get("stream"):
            await call.answer(200, b'{"id":"resp_cloud","object":"response","status":"completed","output":[{"type":"message"}]}')
            return
        await call.begin_stream()
        await call.part(b"".join(response_events()))
        await call.end_stream()

    async def cut(call: Call) -> None:
        await call.begin_stream()
        await call.part(b"".join(response_events()[:cut_after]))
        raise anyio.EndOfStream

    setup.cloud.behave = answers
    async with setup.running(probes=False) as house:
        raw = await house.client.post("/v1/responses", json={"model": "deepseek-chat", "input": "hi", "stream": True})
        assert raw.content == b"".join(response_events()), "untouched"
        assert await spoken(house) == CLOUD_TEXT
        assert (await house.openai.responses.create(model="deepseek-chat", input="hi")).id == "resp_cloud"
        setup.cloud.behave, cut_after = cut, 1
        assert await spoken(house) == LOCAL_TEXT
        setup.cloud.behave = answers
        assert await spoken(house) == CLOUD_TEXT
        setup.cloud.behave, cut_after = cut, 3
        with pytest.raises(openai.APIError, match="not gone on with"):
            await spoken(house)
        assert isinstance(house.primary.state, Closed)
        state = house.primary.state
        setup.cloud.behave = status(404)
        assert await spoken(house) == LOCAL_TEXT, "DeepSeek has no such path"
        assert (await house.openai.responses.create(model="deepseek-chat", input="hi")).output_text == LOCAL_TEXT
        assert house.primary.state == state, "and is well all the same"
        with pytest.raises(openai.InternalServerError, match="cannot stand in: store"):
            await house.openai.responses.create(model="deepseek-chat", input="hi", store=True)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_what_the_primary_writes_is_paid_for_by_the_key_that_asked(setup: Setup, stream: bool) -> None:
    setup.policy = replace(setup.policy, budgets=Budgets())
    digest = hashlib.sha256(b"client-key").digest()
    setup.keys = {digest: KeyRules(tokens_per_minute=len(WORDS))}
    async with setup.running(probes=False) as house:
        for _ in range(20):
            headers = {"authorization": "Bearer client-key"}
            answer = await house.client.post("/v1/chat/completions", json={**ASKED, "stream": stream}, headers=headers)
            if answer.status_code != 200:
                break
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "tokens")
        assert len(setup.cloud.calls) < 20


def thinking_events(*pieces: dict[str, Any]) -> bytes:
    head = {"id": "chatcmpl-cloud", "object": "chat.completion.chunk", "created": 1700000000, "model": "deepseek-chat"}
    chunks = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in pieces]
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


def cut_behind(events: bytes) -> primaries.Behaviour:
    async def cut(call: Call) -> None:
        await call.begin_stream()
        await call.part(events)
        raise anyio.EndOfStream

    return cut


async def deltas(house: House, **more: Any) -> tuple[str, str, list[dict[str, Any]], str | None]:
    """(thoughts, words, calls, finish reason) of a stream that must be whole."""
    answer = await house.client.post("/v1/chat/completions", json={**ASKED, **more, "stream": True})
    assert answer.text.endswith("data: [DONE]\n\n"), answer.text
    choices = [choice for line in answer.text.split("\n\n") if line.startswith("data: {") for choice in chunk_of(line)["choices"]]
    said = [choice["delta"] for choice in choices]
    thoughts, words = ("".join(delta.get(name) or "" for delta in said) for name in ("reasoning_content", "content"))
    return thoughts, words, [call for delta in said for call in delta.get("tool_calls", ())], choices[-1]["finish_reason"]


async def test_a_stream_cut_in_its_thoughts_is_answered_and_no_mark_of_thoughts_is_shown(setup: Setup) -> None:
    setup.policy = replace(setup.policy, budgets=Budgets())
    setup.cloud.behave = cut_behind(thinking_events({"role": "assistant", "content": ""}, {"reasoning_content": "Let me see. "}))
    setup.text.words = ("<think>", "hm", "</think>", "\n\nIt is", " Paris.")
    async with setup.running(probes=False) as house:
        assert await deltas(house) == ("Let me see. hm", "It is Paris.", [], "stop")
        assert setup.text.told["thinking"] is False, "there was enough of it"
        assert setup.text.begun is None
        assert setup.text.last
        assert setup.text.last.tenant == "127.0.0.1"
        setup.text.words = ('<tool_call>{"name": "weather",', ' "arguments": {"city": "Oslo"}}</tool_call>')
        tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
        _, words, (call,), finish = await deltas(house, tools=tools)
        assert (words, call["function"]["name"], finish) == ("", "weather", "tool_calls"), "no word was sent, so tools are still offered"


async def test_words_go_on_after_thoughts_and_behind_a_begun_answer(setup: Setup) -> None:
    setup.policy = replace(setup.policy, budgets=Budgets())
    events = thinking_events({"role": "assistant", "content": ""}, {"reasoning_content": "Hm."}, {"content": "a time"})
    setup.cloud.behave = cut_behind(events)
    begun = [*ASKED["messages"], {"role": "assistant", "content": "Once upon ", "prefix": True}]
    async with setup.running(probes=False) as house:
        assert await deltas(house, messages=begun, model="deepseek-chat:law") == ("Hm.", "a time <0> <1> <2>", [], "stop")
        assert setup.text.begun in ("Once upon a time", "Once upon "), "asked for both, to tell what is the answer's"
        assert setup.text.told["messages"] == [{"role": "user", "content": "hi"}]
        assert setup.text.last
        assert (setup.text.last.adapter, setup.text.last.tenant) == ("law", "127.0.0.1")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_client_in_a_hurry_is_answered_here_in_its_time_and_blames_nobody(setup: Setup, stream: bool) -> None:
    setup.cloud.behave = setup.cloud.probed = primaries.hang
    setup.policy = replace(setup.policy, budgets=Budgets())
    async with setup.running(probes=False) as house:
        for _ in range(3):
            answer = await house.client.post("/v1/chat/completions", json={**ASKED, "stream": stream}, headers={"x-request-timeout": "4"})
            assert (answer.status_code, answer.headers["x-hotspare-backend"]) == (200, "local")
            if not stream:
                break  # its probe has failed, and that is the primary's own fault
        assert isinstance(house.primary.state, Closed)
