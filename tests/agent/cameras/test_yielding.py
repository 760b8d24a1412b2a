"""Cameras step back to their floor while text is asked for, say so, and come back; through a real vision worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anyio
import pytest

from agent.cameras.yielding import Yielding, text_load
from agent.supervision.state import Running
from agent.worker_protocol import Status
from tests.agent.test_vision import node


def test_load_is_what_runs_and_waits_for_text() -> None:
    models = {
        "chat": {"task": "generation", "running": 2, "waiting": 3},
        "embed": {"task": "embedding", "waiting": 7},
        "other": {"task": "generation", "running": 1, "waiting": 0},
    }
    assert text_load(Status(models, {}, 0.0, 0)) == 6
    assert text_load(None) == 0


@pytest.mark.anyio
async def test_a_camera_goes_at_its_floor_while_text_is_asked_for_also_in_the_next_worker(tmp_path: Path) -> None:
    requests = 1
    async with node(tmp_path) as made, anyio.create_task_group() as tasks:
        yielding = Yielding(made.worker, lambda: requests, quiet_s=0.5)
        tasks.start_soon(yielding.run)

        def camera(is_slowed: bool) -> bool:
            cameras = made.vision.cameras()
            return bool(cameras) and cameras[0].get("is_slowed") is is_slowed

        await made.start(fps=10.0, floor_fps=2.0)
        await made.until(lambda: camera(is_slowed=True), "slowed")
        assert made.vision.cameras()[0]["fps_wanted"] == 2.0
        await made.until(lambda: 0 < made.vision.cameras()[0]["fps"] < 3.5, "the floor's rate")
        requests = 0
        await made.until(lambda: camera(is_slowed=False), "as configured")
        await made.until(lambda: made.vision.cameras()[0]["fps"] > 5, "the rate it had")
        requests = 3
        await made.until(lambda: camera(is_slowed=True), "slowed again")
        before = made.worker.state
        assert isinstance(before, Running)
        os.kill(before.pid, signal.SIGKILL)
        await made.until(lambda: isinstance(made.worker.state, Running) and made.worker.state.pid != before.pid, "another worker")
        await made.open()
        await made.start(fps=10.0, floor_fps=2.0)
        await made.until(lambda: camera(is_slowed=True) and made.vision.cameras()[0]["processed"] > 0, "slowed in the next one")
        tasks.cancel_scope.cancel()
