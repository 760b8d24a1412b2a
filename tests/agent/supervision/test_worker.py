from __future__ import annotations

import gc
import os
import signal
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from agent.errors import WorkerLost, WorkerRefused
from agent.supervision.state import BackingOff, Quarantined, Running, Starting, Stopped
from agent.supervision.worker import Worker
from agent.worker_protocol import Done, OpenModel, Status, Tokens
from tests.agent.supervision.running import FAST, MANIFEST, chaos, generate, open_chaos, until, with_policy

pytestmark = pytest.mark.anyio


def pid_of(worker: Worker) -> int:
    assert isinstance(worker.state, Running)
    return worker.state.pid


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def oom_preference(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def cancelled_and_running(worker: Worker) -> tuple[int, int]:
    chaos = worker.status.models.get("chaos", {}) if worker.status else {}
    return len(chaos.get("cancelled", ())), chaos.get("running", 0)


async def tokens_of(worker: Worker, model: str = "count", count: int = 4) -> list[int]:
    taken: list[int] = []
    async for news in worker.stream(generate(model, count)):
        if isinstance(news, Tokens):
            taken.extend(news.tokens)
    return taken


async def test_answers_streams_and_reports() -> None:
    async with chaos() as (worker, seen):
        assert await tokens_of(worker, count=50) == list(range(50))
        assert isinstance(worker.state, Running)
        assert worker.state.incarnation == 1
        assert "numpy" in worker.state.versions
        await until(lambda: any(isinstance(report, Status) for report in seen.reports))
        assert worker.status is not None
        assert worker.status.memory_bytes > 1 << 20
        pid = pid_of(worker)
        assert oom_preference(pid) > oom_preference(os.getpid())
        await worker.stop()
        assert not is_alive(pid)
        assert [type(state) for state in seen.states] == [Starting, Running, Stopped]
        assert worker.restarts == {}


async def test_two_streams_interleave() -> None:
    order: list[str] = []

    async def follow(worker: Worker, name: str) -> None:
        async for news in worker.stream(generate("count", 200)):
            order.extend(name for _ in getattr(news, "tokens", ()))

    async with chaos() as (worker, _):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow, worker, "a")
            tasks.start_soon(follow, worker, "b")
        assert order.count("a") == order.count("b") == 200
        assert set(order[:200]) == set(order[200:]) == {"a", "b"}, "one waited for the other"


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("segfault", "segfault", "signal SIGSEGV"),
        ("exit", "exit", "exit status 3"),
        ("nonsense", "protocol", "frame"),
    ],
)
async def test_a_death_is_one_clear_error_then_it_works_again(model: str, kind: str, words: str) -> None:
    async with chaos() as (worker, seen):
        with pytest.raises(WorkerLost) as lost:
            await worker.call(generate(model))
        assert lost.value.cause.kind == kind
        assert words in str(lost.value)
        await until(lambda: isinstance(worker.state, Running) and worker.state.incarnation == 2)
        await open_chaos(worker)
        assert await tokens_of(worker) == [0, 1, 2, 3]
        assert worker.restarts == {kind: 1}
        assert [type(state) for state in seen.states[:5]] == [Starting, Running, BackingOff, Starting, Running]


async def test_segfault_leaves_the_stack_as_evidence() -> None:
    async with chaos() as (worker, _):
        with pytest.raises(WorkerLost) as lost:
            await worker.call(generate("segfault"))
        evidence = "\n".join(lost.value.cause.evidence)
        assert "Fatal Python error: Segmentation fault" in evidence
        assert "chaos_worker.py" in evidence


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
async def test_a_signal_in_mid_answer_ends_every_request_once(number: signal.Signals) -> None:
    losses: list[str] = []

    async def follow(worker: Worker, has_begun: anyio.Event) -> None:
        try:
            async for _ in worker.stream(generate("count", 100_000)):
                has_begun.set()
        except WorkerLost as lost:
            losses.append(lost.cause.kind)

    async with chaos() as (worker, _):
        async with anyio.create_task_group() as tasks:
            begun = [anyio.Event(), anyio.Event()]
            for event in begun:
                tasks.start_soon(follow, worker, event)
            for event in begun:
                await event.wait()
            killed_at_s = time.monotonic()
            os.kill(pid_of(worker), number)
        assert losses == [{signal.SIGSEGV: "segfault", signal.SIGKILL: "killed"}[number]] * 2
        assert time.monotonic() - killed_at_s < 2
        await until(lambda: isinstance(worker.state, Running))


async def test_a_hang_is_ended_with_stacks() -> None:
    async with chaos(replace(FAST, hang_s=2.0)) as (worker, _):
        with pytest.raises(WorkerLost) as lost:
            await worker.call(generate("hang"))
        assert lost.value.cause.kind == "hang"
        assert any("in hang" in line for line in lost.value.cause.evidence)
        await until(lambda: isinstance(worker.state, Running))
        assert worker.restarts == {"hang": 1}


async def test_a_stopped_process_is_killed_when_it_cannot_abort() -> None:
    async with chaos(replace(FAST, hang_s=2.0, abort_s=0.2)) as (worker, _):
        pid = pid_of(worker)
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: worker.last_cause is not None)
        assert worker.last_cause is not None
        assert worker.last_cause.kind == "hang"
        assert not is_alive(pid)


async def test_opening_a_model_may_take_longer_than_a_hang() -> None:
    async with chaos(replace(FAST, hang_s=2.0)) as (worker, _):
        done, _ = await worker.call(OpenModel(0, "slow", MANIFEST, "/", {"seconds": 3.4}), deadline_s=20)
        assert isinstance(done, Done)
        assert worker.restarts == {}


async def test_quarantine_after_too_many_crashes_and_release() -> None:
    async with chaos(with_policy(crashes=3)) as (worker, _):
        for _ in range(3):
            await until(lambda: isinstance(worker.state, Running))
            os.kill(pid_of(worker), signal.SIGKILL)
            await until(lambda: not isinstance(worker.state, Running))
        await until(lambda: isinstance(worker.state, Quarantined))
        with pytest.raises(WorkerLost) as lost:
            await worker.call(generate("count"))
        assert lost.value.cause.kind == "killed"
        with pytest.raises(WorkerLost):
            await worker.until_running(5)
        worker.release()
        assert (await worker.until_running(20)).incarnation == 4


async def test_refusals_and_bugs_do_not_kill_it() -> None:
    async with chaos() as (worker, _):
        for model, reason in [("refuse", "busy"), ("engine", "engine"), ("bug", "internal")]:
            with pytest.raises(WorkerRefused) as refused:
                await worker.call(generate(model))
            assert refused.value.reason == reason
        assert "ZeroDivisionError: a bug" in str(refused.value)
        assert await tokens_of(worker) == [0, 1, 2, 3]


async def test_a_deadline_cancels_in_the_worker() -> None:
    async with chaos() as (worker, _):
        with pytest.raises(WorkerRefused) as refused:
            await worker.call(generate("silent"), deadline_s=0.2)
        assert refused.value.reason == "deadline"
        await until(lambda: cancelled_and_running(worker) == (1, 0))


@pytest.mark.parametrize("how", ["task cancelled", "closed early", "collected"])
async def test_a_caller_that_leaves_ends_the_work(how: str) -> None:
    async with chaos() as (worker, _):
        if how == "task cancelled":
            with anyio.move_on_after(0.1):
                await tokens_of(worker, count=1_000_000)
        else:
            reports = worker.stream(generate("count", 1_000_000))
            if how == "closed early":
                async with aclosing(reports):
                    await anext(reports)
            else:
                await anext(reports)
                del reports
                gc.collect()
        await until(lambda: cancelled_and_running(worker) == (1, 0))


async def test_a_slow_reader_gets_merged_tokens_and_holds_up_nobody() -> None:
    async with chaos() as (worker, _):
        slow = worker.stream(generate("count", 60))
        async with aclosing(slow):
            first = await anext(slow)
            assert await tokens_of(worker, count=80) == list(range(80))
            second = await anext(slow)
            assert isinstance(first, Tokens)
            assert isinstance(second, Tokens)
            assert first.tokens + second.tokens == tuple(range(60))
            assert isinstance(await anext(slow), Done)


async def test_too_many_open_requests_are_refused() -> None:
    async with chaos(replace(FAST, in_flight=2)) as (worker, _), anyio.create_task_group() as tasks:
        reports = [worker.stream(generate("count", 100_000)) for _ in range(2)]
        for stream in reports:
            await anext(stream)
        with pytest.raises(WorkerRefused) as refused:
            await worker.call(generate("count"))
        assert refused.value.reason == "busy"
        for stream in reports:
            await stream.aclose()
        assert await tokens_of(worker) == [0, 1, 2, 3]
        tasks.cancel_scope.cancel()


async def test_output_is_bounded_and_its_end_is_kept() -> None:
    async with chaos() as (worker, _):
        with pytest.raises(WorkerLost) as lost:
            await worker.call(generate("flood"))
        assert len(lost.value.cause.evidence) == 50
        assert lost.value.cause.evidence[-1].startswith("line 4999 ")


async def test_stop_lets_it_close_and_cancellation_leaves_nothing() -> None:
    async with chaos() as (worker, _):
        started_s = time.monotonic()
        pid = pid_of(worker)
        await worker.stop()
        assert time.monotonic() - started_s < 3
        assert worker.last_cause is not None
        assert worker.last_cause.kind == "stopped"
        assert worker.last_cause.status == 0
        assert "closed cleanly" in worker.last_cause.evidence
    async with chaos() as (worker, _):
        pid = pid_of(worker)
    assert not is_alive(pid)
    assert isinstance(worker.state, Stopped)


async def test_stop_ends_a_hung_worker_in_time() -> None:
    async with chaos(replace(FAST, stop_s=0.5, hang_s=60)) as (worker, _), anyio.create_task_group() as tasks:

        async def ask() -> None:
            with pytest.raises(WorkerLost):
                await worker.call(generate("hang"))

        tasks.start_soon(ask)
        await anyio.sleep(0.1)
        pid = pid_of(worker)
        await worker.stop()
        assert not is_alive(pid)


async def test_what_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async with chaos(command=("/nowhere/python",), comes_up=False) as (worker, _):
        await until(lambda: worker.last_cause is not None)
        assert worker.last_cause is not None
        assert worker.last_cause.kind == "spawn"
        assert "/nowhere/python" in worker.last_cause.text
    monkeypatch.setenv("CHAOS_AT_START", "missing module")
    async with chaos(comes_up=False) as (worker, _):
        await until(lambda: worker.last_cause is not None)
        assert worker.last_cause is not None
        assert worker.last_cause.kind == "import"
        assert "a_module_that_is_missing" in worker.last_cause.text


async def test_one_that_never_gets_ready_is_ended() -> None:
    async with chaos(replace(FAST, ready_s=0.3, abort_s=0.2), command=("/bin/sh", "-c", "sleep 60"), comes_up=False) as (worker, _):
        await until(lambda: worker.last_cause is not None)
        assert worker.last_cause is not None
        assert worker.last_cause.kind == "not_ready"


async def test_a_lost_device_ends_its_worker_and_no_other() -> None:
    """What a fault of CUDA becomes (the real one: tests/gpu/test_worker_fault.py): never the answer to one request."""
    async with chaos() as (worker, _), chaos() as (other, _):
        pid, others = pid_of(worker), pid_of(other)
        with pytest.raises(WorkerLost) as lost:
            await tokens_of(worker, "lost device")
        assert lost.value.cause.kind == "exit"
        assert any("DeviceLost" in line for line in lost.value.cause.evidence)
        await open_chaos(worker)
        assert pid_of(worker) != pid
        assert await tokens_of(worker) == [0, 1, 2, 3]
        assert (await tokens_of(other), pid_of(other)) == ([0, 1, 2, 3], others)
