"""A primary's faults as clients of nginx see them, configured as the coordinator renders it: alone, and with a gateway behind it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import httpx
import pytest
from anyio.streams.tls import TLSListener

from agent.demo.programs import free_port, program, write_nginx
from coordinator.config import NginxSettings
from coordinator.nginx import Backup, render
from tests.agent.gateway import primaries
from tests.agent.gateway.conftest import LOCAL, Setup
from tests.agent.gateway.primaries import WORDS, Behaviour, cut_at, stall_after, status, stream_bytes
from tests.agent.gateway.test_gateway import self_signed

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(60),
    pytest.mark.skipif(
        shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin") is None, reason="nginx is not installed"
    ),
]
CLOUD_TEXT, LOCAL_TEXT = "".join(WORDS), "".join(LOCAL)
READ_S = 0.5
EVENTS = b"".join(stream_bytes())

COVERED: dict[str, Behaviour] = {
    "close": primaries.close,
    "hang before the head": primaries.hang,
    "slow loris": primaries.slow_loris,
    "429": status(429), "500": status(500), "503": status(503),
}  # fmt: skip
# What reaches the client where nginx stands alone before the primary; docs/gateway.md has the same list.
NOT_COVERED: dict[str, Behaviour] = {
    "402": status(402), "401": status(401), "529": status(529),
    "hang after the head": primaries.head_then_hang,
    "comments only": primaries.comments_only,
    "garbage events": primaries.garbage_events,
    "a page": primaries.page_instead,
    "garbage": primaries.garbage,
    "cut": cut_at(len(EVENTS) // 2),
    "stalled": stall_after(3),
}  # fmt: skip


@asynccontextmanager
async def nginx(
    folder: Path, primary_url: str, backups: Sequence[Backup] = (), read_timeout_s: float = READ_S
) -> AsyncIterator[httpx.AsyncClient]:
    port, snippet = free_port(), folder / "hotspare.conf"
    settings = NginxSettings(listen=f"127.0.0.1:{port}", bridge_port=free_port(), read_timeout_s=read_timeout_s)
    snippet.write_text(render(settings, primary_url, backups))
    async with (
        program(write_nginx(folder, snippet), folder / "nginx.log", port),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=read_timeout_s + 1.5) as client,
    ):
        yield client


async def outcome(client: httpx.AsyncClient, model: str, within_s: float = 3.0) -> str:
    """The text of a whole streamed answer; else what is wrong with it."""
    asked = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    try:
        with anyio.fail_after(within_s):
            answer = await client.post("/v1/chat/completions", json=asked)
    except (httpx.HTTPError, TimeoutError) as error:
        return f"broken: {type(error).__name__}"
    if answer.status_code != 200:
        return f"broken: status {answer.status_code}"
    if not answer.text.endswith("data: [DONE]\n\n"):
        return "broken: truncated"
    try:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    except ValueError:
        return "broken: no JSON"


@pytest.mark.parametrize("failure", [*COVERED, *NOT_COVERED])
async def test_nginx_alone_covers_what_it_can_see(setup: Setup, tmp_path: Path, failure: str) -> None:
    setup.cloud.behave = {**COVERED, **NOT_COVERED}[failure]
    async with setup.running(probes=False) as house:
        node = Backup("edge-a", "127.0.0.1", house.client.base_url.port or 0, weight=1)
        async with nginx(tmp_path, setup.cloud.url, [node]) as client:
            answer = await outcome(client, "parrot")  # the node's own model: it answers whatever its gateway thinks
    if failure in COVERED:
        assert answer == LOCAL_TEXT
    else:
        assert answer.startswith("broken"), f"nginx covers it after all ({answer}): move it in the lists here and in docs/gateway.md"


async def test_a_primary_whose_certificate_is_not_accepted_is_covered(setup: Setup, tmp_path: Path) -> None:
    async def speak(stream: anyio.abc.ByteStream) -> None:
        async with stream:
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                await stream.receive()

    plain: anyio.abc.Listener[Any] = await anyio.create_tcp_listener(local_host="127.0.0.1")
    url = f"https://127.0.0.1:{plain.extra(anyio.abc.SocketAttribute.local_port)}"
    async with TLSListener(plain, self_signed(tmp_path), standard_compatible=False) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, speak)
        async with setup.running(probes=False) as house:
            node = Backup("edge-a", "127.0.0.1", house.client.base_url.port or 0, weight=1)
            async with nginx(tmp_path, url, [node], read_timeout_s=20.0) as client:
                assert await outcome(client, "parrot", within_s=20.0) == LOCAL_TEXT
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("failure", [*COVERED, *NOT_COVERED])
async def test_with_a_gateway_behind_nginx_every_answer_is_whole(setup: Setup, tmp_path: Path, failure: str) -> None:
    setup.cloud.behave = setup.cloud.probed = {**COVERED, **NOT_COVERED}[failure]
    quick = setup.policy.budgets.__class__(connect_s=0.3, first_byte_s=0.2, first_token_s=0.2, between_tokens_s=0.2, answer_s=5.0)
    setup.policy = setup.policy.__class__("", quick)
    # nginx waits longer than the gateway's budgets by far: a gateway that a busy machine holds up for a moment is not dead.
    async with setup.running(probes=False) as house, nginx(tmp_path, str(house.client.base_url), read_timeout_s=20.0) as client:
        answer = await outcome(client, "deepseek-chat", within_s=20.0)
    begun = setup.text.begun
    assert answer == (LOCAL_TEXT if begun is None else begun + " <0> <1> <2>")
    assert begun is None or CLOUD_TEXT.startswith(begun)
