"""A client that leaves during a long prompt frees its slot within a step: a real worker process, an engine that waits for the test."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import pytest

from agent.supervision.worker import Worker
from agent.worker_protocol import Done, Generate, OpenModel
from tests.agent.supervision.running import FAST, until
from tests.agent.worker.test_text_service import MANIFEST

pytestmark = pytest.mark.anyio

COMMAND = (sys.executable, str(Path(__file__).with_name("paced_worker.py")))
CHUNK, PROMPT = 128, 3000


async def test_who_leaves_during_a_long_prompt_frees_the_slot_within_a_step(tmp_path: Path) -> None:
    worker = Worker("text", COMMAND, replace(FAST, hang_s=60.0))
    steps, permits = tmp_path / "steps", tmp_path / "permits"
    ends: list[Done] = []

    def begun() -> list[int]:
        return [int(line) for line in steps.read_text().splitlines()]

    def permit(count: int) -> None:
        beside = tmp_path / "permits.new"
        beside.write_text(str(count))
        beside.replace(permits)

    def ids(count: int) -> bytes:
        return np.random.default_rng(count).integers(3, 97, count).astype("<i4").tobytes()

    async def ask_at_length(client: anyio.CancelScope) -> None:
        with client:
            await worker.call(Generate(0, "fake", 4), ids(PROMPT), 60.0)

    async def ask_shortly() -> None:
        done, _ = await worker.call(Generate(0, "fake", 1), ids(5), 60.0)
        ends.append(done)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await worker.until_running(30)
        await worker.call(OpenModel(0, "fake", MANIFEST, str(tmp_path), {"slots": 1, "context_tokens": 4096}), b"", 30)
        warmed = len(begun())
        permit(warmed + 3)
        client = anyio.CancelScope()
        tasks.start_soon(ask_at_length, client)
        await until(lambda: len(begun()) == warmed + 4)
        client.cancel()
        assert begun()[warmed:] == [CHUNK] * 4
        tasks.start_soon(ask_shortly)  # waits for the only slot
        while begun()[-1] == CHUNK and len(begun()) < warmed + 10:
            await anyio.sleep(0.3)  # until the worker's reader has heard of it
            count = len(begun())
            permit(count)
            await until(lambda count=count: len(begun()) > count)  # type: ignore[misc]
        assert begun()[warmed:] == [CHUNK] * 4 + [5], "the chunk that was being computed was the last"
        permits.unlink()
        await until(lambda: bool(ends))
        tasks.cancel_scope.cancel()
    assert (ends[0].result["finish"], ends[0].result["cached_tokens"]) == ("length", 0)
