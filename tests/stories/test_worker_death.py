"""A worker crashes, hangs or is killed in the middle of a request; the node stays and says one clear thing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from tests.stories.house import CHAT, House, Node, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]
LONG = {"model": CHAT, "temperature": 0, "max_tokens": 400, "messages": [{"role": "user", "content": "Tell me a long story about a fox."}]}


async def text_worker(node: Node) -> dict[str, Any]:
    workers: list[dict[str, Any]] = (await node.state())["workers"]
    return next(worker for worker in workers if worker["name"] == "text")


async def restarts(node: Node) -> float:
    lines = (await node.client.get("/metrics")).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("hotspare_worker_restarts") and 'worker="text"' in line)


async def streamed(node: Node, started: anyio.Event) -> tuple[str, list[dict[str, Any]], bool]:
    """(text, errors, was it ended by [DONE])"""
    text, errors, is_done = "", [], False
    async with node.client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                is_done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                errors.append(event["error"])
            else:
                text += event["choices"][0]["delta"].get("content") or ""
                if len(text) > 20:
                    started.set()
    return text, errors, is_done


async def test_a_crash_in_mid_stream_is_one_error_and_the_node_stays(tmp_path: Path) -> None:
    house = House(tmp_path)
    async with house.node(house.node_settings("edge-a", worker={"hang_s": 3.0})) as node:
        await node.until_serving(CHAT)
        for number, kill in enumerate((signal.SIGSEGV, signal.SIGKILL, signal.SIGSTOP), start=1):
            pid = (await text_worker(node))["pid"]
            started = anyio.Event()
            outcome: list[tuple[str, list[dict[str, Any]], bool]] = []

            async def read(started: anyio.Event = started, outcome: list[Any] = outcome) -> None:
                outcome.append(await streamed(node, started))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                with anyio.fail_after(30):
                    await started.wait()
                os.kill(pid, kill)
            text, errors, is_done = outcome[0]
            assert len(text) > 20
            assert [error["code"] for error in errors] == ["worker_lost"], f"after {kill.name}"
            assert not is_done, "a torn answer must not look whole"

            await node.until_serving(CHAT, deadline_s=60)
            worker = await text_worker(node)
            assert worker["pid"] != pid
            assert (worker["restarts"], await restarts(node)) == (number, number)
            again = await node.client.post("/v1/chat/completions", json={**LONG, "max_tokens": 5})
            assert again.status_code == 200
        assert node.process.returncode is None
        told = [event["message"] for event in (await node.state())["events"] if event["kind"] == "worker" and event["severity"] == "error"]
        assert len(told) == 3
        assert "SIGSEGV" in told[0]


async def test_an_answer_of_which_nothing_was_given_is_asked_again(tmp_path: Path) -> None:
    house = House(tmp_path)
    async with house.node(house.node_settings("edge-a")) as node:
        await node.until_serving(CHAT)
        pid = (await text_worker(node))["pid"]
        os.kill(pid, signal.SIGSTOP)  # the request is surely taken, and surely not answered
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await node.client.post("/v1/chat/completions", json={**LONG, "max_tokens": 5}))

        async def in_flight() -> bool:
            metrics = (await node.client.get("/metrics")).text
            return any(line.startswith("hotspare_") and "flight" in line and line.endswith(" 1.0") for line in metrics.splitlines())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await until(in_flight, 10, "the request is in flight")
            os.kill(pid, signal.SIGKILL)
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] == 5
