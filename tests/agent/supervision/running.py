"""A supervised chaos worker for the length of a block."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio

from agent.supervision.incarnation import SupervisionSettings
from agent.supervision.restart import RestartPolicy
from agent.supervision.state import WorkerState
from agent.supervision.worker import Worker
from agent.worker_protocol import Generate, OpenModel, Report

CHAOS = (sys.executable, str(Path(__file__).with_name("chaos_worker.py")))
MANIFEST = {"task": "generation"}
FAST = SupervisionSettings(
    ready_s=20, hang_s=3, abort_s=3, stop_s=5, restart=RestartPolicy(first_s=0.05, cap_s=0.2, crashes=4, window_s=60, quarantine_s=60)
)


@dataclass
class Seen:
    states: list[WorkerState] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)


def generate(model: str, max_tokens: int = 4) -> Generate:
    return Generate(0, model, max_tokens)


async def until(is_true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for a condition that another task or process brings about."""
    with anyio.fail_after(seconds):
        while not is_true():  # noqa: ASYNC110  # what is waited for lies in another process
            await anyio.sleep(0.01)


async def open_chaos(worker: Worker) -> None:
    await worker.until_running(20)
    await worker.call(OpenModel(0, "chaos", MANIFEST, "/"))


@asynccontextmanager
async def chaos(
    settings: SupervisionSettings = FAST, command: tuple[str, ...] = CHAOS, comes_up: bool = True
) -> AsyncIterator[tuple[Worker, Seen]]:
    seen = Seen()
    worker = Worker("chaos", command, settings, lambda report, _: seen.reports.append(report), seen.states.append)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        if comes_up:
            await open_chaos(worker)
        yield worker, seen
        tasks.cancel_scope.cancel()


def with_policy(**values: float) -> SupervisionSettings:
    return replace(FAST, restart=replace(FAST.restart, **values))  # type: ignore[arg-type]  # names and types are those of RestartPolicy
