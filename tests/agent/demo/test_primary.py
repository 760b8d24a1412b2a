"""The stand-in for the cloud API: its switch, and what becomes of its port meanwhile."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import anyio
import httpx
import pytest

from agent.demo.primary import SwitchablePrimary

pytestmark = pytest.mark.anyio


@pytest.fixture
async def primary() -> AsyncIterator[SwitchablePrimary]:
    async with anyio.create_task_group() as tasks:
        primary = SwitchablePrimary()
        tasks.start_soon(primary.run)
        await primary.switch(True)
        yield primary
        tasks.cancel_scope.cancel()


async def test_off_it_refuses_connections_and_on_it_answers(primary: SwitchablePrimary) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        for _ in range(2):
            answer = await client.post(f"{primary.url}/v1/chat/completions", json={"messages": [], "max_tokens": 3})
            assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 3)
            await primary.switch(False)
            with pytest.raises(httpx.ConnectError):
                await client.get(f"{primary.url}/v1/models")
            await primary.switch(True)


async def test_two_hands_on_the_switch_leave_it_as_the_last_one_wanted(primary: SwitchablePrimary) -> None:
    async with anyio.create_task_group() as tasks:
        for on in (False, True, False):
            tasks.start_soon(primary.switch, on)
    with anyio.fail_after(5):
        await primary.switch(False)
    assert not primary.is_on


async def test_it_stays_off_when_its_port_is_taken_meanwhile(primary: SwitchablePrimary) -> None:
    await primary.switch(False)
    with socket.create_server(("127.0.0.1", primary.port)):
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.post(primary.switch_url, params={"on": "true"})
        assert answer.json() == {"on": False}
    await primary.switch(True)
    assert primary.is_on


async def test_what_is_no_question_is_the_clients_fault(primary: SwitchablePrimary) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        for body in (b"{", b"[1]", b'{"max_tokens": "x"}'):
            assert (await client.post(f"{primary.url}/v1/chat/completions", content=body)).status_code == 400
