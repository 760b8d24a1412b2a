"""Batches that are run: to their end, over a kill, out of their window, beside a full disk."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import anyio
import anyio.lowlevel
import pytest

from agent.batches.line import Line, Reply
from agent.batches.record import Batch, Status, told_to_stop
from agent.batches.runner import BatchRunner, RunnerLimits
from agent.batches.store import BatchStore
from agent.batches.validation import validate
from tests.agent.batches.rooms import DAY_S, Clock, answers, jsonl, opened, ordered, read, request
from tests.conftest import ROOT

pytestmark = pytest.mark.anyio
FINAL: tuple[Status, ...] = ("completed", "failed", "expired", "cancelled")
GOOD = json.dumps({"usage": {"prompt_tokens": 2, "completion_tokens": 1}}).encode()


@dataclass
class Desk:
    """Answers lines, unless a line's words are `hold`: then when it is let. Writes down what it was asked."""

    asked: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    go_on: anyio.Event = field(default_factory=anyio.Event)

    async def ask(self, batch: Batch, line: Line) -> Reply:
        self.asked.append(line.custom_id)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if b'"hold"' in line.body:
                await self.go_on.wait()
            await anyio.lowlevel.checkpoint()
            return Reply(400, b'{"error": {"code": "invalid_value"}}', "r") if b'"bad"' in line.body else Reply(200, GOOD, "r")
        finally:
            self.running -= 1


class Asked(Protocol):
    async def ask(self, batch: Batch, line: Line) -> Reply: ...


@asynccontextmanager
async def running(
    store: BatchStore, desk: Asked, at_once: int = 4, may_run: Callable[[], bool] = lambda: True, limits: RunnerLimits | None = None
) -> AsyncIterator[None]:
    """Leaving it is what the end of the daemon does."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(BatchRunner(store, desk.ask, may_run, limits or RunnerLimits(at_once=at_once), tick_s=0.01).run)
        yield
        tasks.cancel_scope.cancel()


async def until(holds: Callable[[], object]) -> None:
    with anyio.fail_after(60):
        while not holds():  # noqa: ASYNC110 - what the runner does is seen on the disk and in its records
            await anyio.sleep(0.01)


def is_over(store: BatchStore, batch: Batch) -> Callable[[], bool]:
    return lambda: store.batches[batch.id].status in FINAL


async def test_every_line_has_one_answer_and_few_are_asked_at_once(tmp_path: Path) -> None:
    store, desk = opened(tmp_path), Desk()
    names = [f"c{number}" for number in range(100)]
    words = {"c7": "bad", **dict.fromkeys(names[:6], "hold")}
    batch = await ordered(store, jsonl([request(name, words.get(name, "x")) for name in names]))
    async with running(store, desk, at_once=3):
        await until(lambda: desk.running == 3)
        desk.go_on.set()
        await until(is_over(store, batch))
    done = store.batches[batch.id]
    assert (done.status, done.counts.completed, done.counts.failed, done.total) == ("completed", 99, 1, 100)
    assert sorted(answers(store, batch)) == sorted(names)
    assert sorted(desk.asked) == sorted(names)
    assert desk.most_running == 3
    assert set(store.files) == {batch.input_file_id, batch.output_id, batch.error_id}
    assert opened(tmp_path).batches == store.batches


async def test_a_daemon_that_ends_in_the_middle_goes_on_where_it_was(tmp_path: Path) -> None:
    store, desk = opened(tmp_path), Desk()
    names = [f"c{number}" for number in range(30)]
    batch = await ordered(store, jsonl([request(name, "hold" if number >= 10 else "x") for number, name in enumerate(names)]))
    async with running(store, desk):
        await until(lambda: len(answers(store, batch)) == 10)
    assert store.batches[batch.id].status == "in_progress"
    again, other = opened(tmp_path), Desk()
    other.go_on.set()
    async with running(again, other):
        await until(is_over(again, batch))
    assert again.batches[batch.id].status == "completed"
    assert again.batches[batch.id].counts.completed == 30
    assert sorted(answers(again, batch)) == sorted(names)
    assert sorted(other.asked) == sorted(names[10:]), "what had its answer was not asked again"


@pytest.mark.parametrize("status", ["validating", "in_progress", "cancelling", "finalizing"])
async def test_a_batch_is_taken_up_in_whatever_state_the_daemon_left_it(tmp_path: Path, status: Status) -> None:
    store, desk = opened(tmp_path), Desk()
    batch = await ordered(store, jsonl([request("a"), request("b")]))
    total = 0 if status == "validating" else 2
    await store.change(batch.id, lambda one: one.model_copy(update={"status": status, "total": total}))
    if status == "finalizing":
        lines = [{"id": f"batch_req_{batch.id[6:]}_{number}", "response": None, "custom_id": "x"} for number in (1, 2)]
        store.content(batch.error_id).write_bytes(b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines))
    again = opened(tmp_path)
    async with running(again, desk):
        await until(is_over(again, batch))
    assert again.batches[batch.id].status == ("cancelled" if status == "cancelling" else "completed")
    assert len(answers(again, batch)) == 2
    assert len(desk.asked) == (0 if status in ("cancelling", "finalizing") else 2)


async def test_a_window_that_passes_ends_a_batch_with_what_it_has(tmp_path: Path) -> None:
    clock, desk = Clock(), Desk()
    store = opened(tmp_path, clock)
    batch = await ordered(store, jsonl([request("first"), *(request(f"late-{number}", "hold") for number in range(8))]))
    async with running(store, desk):
        await until(lambda: answers(store, batch) == ["first"])
        clock.now += DAY_S
        await until(is_over(store, batch))
    done = store.batches[batch.id]
    assert (done.status, done.expired_at) == ("expired", int(clock.now))
    assert [line["custom_id"] for line in read(store, batch.output_id)] == ["first"]
    assert {line["error"]["code"] for line in read(store, batch.error_id)} == {"batch_expired"}
    assert (done.counts.completed, done.counts.failed, done.total) == (1, 8, 9)


async def test_a_window_that_passed_while_the_node_was_off_or_in_standby(tmp_path: Path) -> None:
    clock, desk = Clock(), Desk()
    store = opened(tmp_path, clock)
    batches = [await ordered(store, jsonl([request("a"), request("b")]), owner=owner) for owner in ("aa", "bb")]
    clock.now += DAY_S + 1
    again = opened(tmp_path, clock)
    async with running(again, desk, may_run=lambda: False):
        for batch in batches:
            await until(is_over(again, batch))
    assert {again.batches[batch.id].status for batch in batches} == {"expired"}
    assert not desk.asked


async def test_a_clock_that_is_set_late_costs_no_window(tmp_path: Path) -> None:
    clock, desk = Clock(is_set=False), Desk()
    store = opened(tmp_path, clock)
    batch = await ordered(store, jsonl([request("a"), request("b", "hold")]))
    async with running(store, desk):
        await until(lambda: "b" in desk.asked)
        clock.now += 30 * DAY_S
        clock.is_set = True
        desk.go_on.set()
        await until(is_over(store, batch))
    assert (store.batches[batch.id].status, store.batches[batch.id].counts.completed) == ("completed", 2)


async def test_owners_are_served_side_by_side_and_the_batches_of_one_after_another(tmp_path: Path) -> None:
    store, desk = opened(tmp_path), Desk()
    stuck = await ordered(store, jsonl([request("stuck", "hold")]), owner="aa")
    second = await ordered(store, jsonl([request("second")]), owner="aa")
    other = await ordered(store, jsonl([request("other")]), owner="bb")
    async with running(store, desk):
        await until(is_over(store, other))
        assert store.batches[stuck.id].status == "in_progress"
        assert store.batches[second.id].status == "in_progress", "it is looked through at once, and waits"
        assert "second" not in desk.asked
        desk.go_on.set()
        await until(is_over(store, second))


async def test_an_input_that_is_gone_ends_its_batch(tmp_path: Path) -> None:
    store, desk = opened(tmp_path), Desk()
    batch = await ordered(store, jsonl([request("a")]))
    store.content(batch.input_file_id).unlink()
    async with running(store, desk):
        await until(is_over(store, batch))
    done = store.batches[batch.id]
    assert (done.status, done.errors[0].code) == ("failed", "input_file_lost")


def no_more_than(reads: int, content: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The medium of this file fails with the read after so many."""
    whole = Path.open

    class Torn:
        def __init__(self, stream: IO[bytes]) -> None:
            self._stream, self._left, self.close = stream, reads, stream.close

        def readline(self, size: int) -> bytes:
            self._left -= 1
            if self._left < 0:
                raise OSError(errno.EIO, "Input/output error")
            return self._stream.readline(size)

    def opened_file(path: Path, mode: str) -> Any:
        stream: Any = whole(path, mode)
        return Torn(stream) if path == content else stream

    monkeypatch.setattr(Path, "open", opened_file)


async def half_done(root: Path, clock: Clock | None = None) -> tuple[BatchStore, Batch]:
    """Three lines, of which two have their answers when the daemon ends."""
    store, desk = opened(root, clock), Desk()
    batch = await ordered(store, jsonl([request("a"), request("b"), request("c", "hold")]))
    async with running(store, desk):
        await until(lambda: len(answers(store, batch)) == 2)
    return opened(root, clock), batch


@pytest.mark.parametrize("way", ["gone", "cut short", "unreadable"])
async def test_answers_stay_when_an_input_is_lost_in_the_middle(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    again, batch = await half_done(tmp_path)
    content = again.content(batch.input_file_id)
    if way == "gone":
        content.unlink()
    elif way == "cut short":
        content.write_bytes(jsonl([request("a"), request("b")]))
    else:
        no_more_than(2, content, monkeypatch)
    async with running(again, Desk()):
        await until(is_over(again, batch))
    done = again.batches[batch.id]
    assert (done.status, done.errors[0].code, done.counts.completed, done.total) == ("failed", "input_file_lost", 2, 3)
    assert done.has_output
    assert again.files[batch.output_id].bytes == again.content(batch.output_id).stat().st_size
    assert sorted(answers(again, batch)) == ["a", "b"]


async def test_a_batch_told_to_stop_ends_though_its_input_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again, batch = await half_done(tmp_path)
    no_more_than(2, again.content(batch.input_file_id), monkeypatch)
    await again.change(batch.id, lambda one: told_to_stop(one, 1))
    async with running(again, Desk()):
        await until(is_over(again, batch))
    assert again.batches[batch.id].errors[0].code == "input_file_lost"
    assert sorted(answers(again, batch)) == ["a", "b"]


async def test_a_limit_that_was_lowered_counts_for_new_batches_only(tmp_path: Path) -> None:
    again, batch = await half_done(tmp_path)
    late, desk = await ordered(again, jsonl([request("a"), request("b")])), Desk()
    desk.go_on.set()
    async with running(again, desk, limits=RunnerLimits(lines=1)):
        await until(is_over(again, batch))
        await until(is_over(again, late))
    assert (again.batches[batch.id].status, again.batches[batch.id].counts.completed) == ("completed", 3)
    assert again.batches[late.id].errors[0].code == "too_many_lines"


async def test_what_nobody_thought_of_ends_one_batch_and_not_the_node(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)

    class Broken(Desk):
        async def ask(self, batch: Batch, line: Line) -> Reply:
            if line.custom_id == "odd":
                return Reply(200, b"no json", "r")
            return await super().ask(batch, line)

    async def no_tidying() -> None:
        raise KeyError("batch_1")

    def no_check(file: Path, *rest: Any) -> Any:
        if file.read_bytes() == b"unheard of":
            raise RuntimeError("no check")
        return validate(file, *rest)

    odd = await ordered(store, jsonl([request("a"), request("odd")]), owner="aa")
    strange = await ordered(store, b"unheard of", owner="bb")
    good = await ordered(store, jsonl([request("b")]), owner="cc")
    monkeypatch.setattr(store, "tidy", no_tidying)
    monkeypatch.setattr("agent.batches.runner.validate", no_check)
    async with running(store, Broken(), at_once=1):
        for batch in (odd, strange, good):
            await until(is_over(store, batch))
    assert [(store.batches[batch.id].status, store.batches[batch.id].errors) for batch in (odd, strange, good)] == [
        ("failed", (told := store.batches[odd.id].errors)), ("failed", told), ("completed", ()),
    ]  # fmt: skip
    assert told[0].code == "internal_error"
    assert (store.batches[odd.id].has_output, answers(store, odd)) == (True, ["a"])
    assert sum(record.exc_info is not None for record in caplog.records) == 3, "each with its trace"


async def test_a_full_disk_is_waited_for_and_no_answer_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    free, desk = [1 << 40], Desk()
    store = opened(tmp_path, free_bytes=free)
    batch = await ordered(store, jsonl([request(f"c{number}") for number in range(20)]))
    free.append(0)
    async with running(store, desk):
        await until(lambda: any("wait for the disk" in record.message for record in caplog.records))
        assert len(desk.asked) <= 4, "nothing is asked that could not be kept"
        free.append(1 << 40)
        await until(is_over(store, batch))
    assert store.batches[batch.id].counts.completed == 20
    assert len(desk.asked) == 20


@dataclass
class Fragile:
    """A desk whose worker dies of the words `poison`, and with it whatever is asked at the time."""

    lost: Reply
    deaths: int = 0
    present: list[str] = field(default_factory=list)

    async def ask(self, batch: Batch, line: Line) -> Reply:
        deaths = self.deaths
        self.present.append(line.custom_id)
        await anyio.sleep(0.02)
        if b'"poison"' in line.body:
            self.deaths += 1
        self.present.remove(line.custom_id)
        return self.lost if self.deaths > deaths else Reply(200, GOOD, "r")


@pytest.mark.parametrize(("status", "code"), [(503, "worker_lost"), (500, "internal_error")])
async def test_a_line_that_kills_its_worker_or_a_step_takes_no_other_with_it(tmp_path: Path, status: int, code: str) -> None:
    store, desk = opened(tmp_path), Fragile(Reply(status, json.dumps({"error": {"code": code}}).encode(), "r"))
    batch = await ordered(store, jsonl([request(f"c{number}", "poison" if number in (3, 9) else "x") for number in range(16)]))
    async with running(store, desk):
        await until(is_over(store, batch))
    assert sorted(line["custom_id"] for line in read(store, batch.error_id)) == ["c3", "c9"]
    assert store.batches[batch.id].counts.completed == 14
    assert desk.deaths == 6, "each was tried three times"


async def test_what_fails_because_the_node_ends_is_no_answer(tmp_path: Path) -> None:
    store, asked, is_open = opened(tmp_path), list[str](), True

    class Ending:
        async def ask(self, batch: Batch, line: Line) -> Reply:
            nonlocal is_open
            asked.append(line.custom_id)
            is_open = False
            return Reply(503, b'{"error": {"code": "worker_lost"}}', "r")

    batch = await ordered(store, jsonl([request("a")]))
    async with running(store, Ending(), may_run=lambda: is_open):
        for _ in range(5):
            is_open = True
            seen = len(asked)
            await until(lambda seen=seen: len(asked) > seen)  # type: ignore[misc]
    assert not answers(store, batch)


SLOW_NODE = """
import sys
from pathlib import Path
import anyio
from agent.batches.line import Reply
from agent.batches.runner import BatchRunner, RunnerLimits
from tests.agent.batches.rooms import opened

asked = 0

async def ask(batch, line):
    global asked
    asked += 1
    await (anyio.sleep_forever() if asked > 100 else anyio.sleep(0.002))
    return Reply(200, b'{"x": "' + b"y" * 300 + b'"}', "r")

store = opened(Path(sys.argv[1]))
anyio.run(BatchRunner(store, ask, lambda: True, RunnerLimits(), 0.01).run)
"""


@pytest.mark.timeout(300)
async def test_a_killed_process_leaves_nothing_out_and_nothing_twice(tmp_path: Path) -> None:
    """A real process, killed at whatever moment it is, five times."""
    store = opened(tmp_path)
    names = [f"c{number}" for number in range(600)]
    batch = await ordered(store, jsonl([request(name) for name in names]))
    output = store.content(batch.output_id)
    for turn in range(1, 6):
        async with await anyio.open_process(
            [sys.executable, "-c", SLOW_NODE, str(tmp_path)], cwd=ROOT, stdout=None, stderr=None
        ) as process:
            await until(lambda least=turn * 60: output.exists() and output.read_bytes().count(b"\n") >= least)  # type: ignore[misc]
            process.kill()
    assert opened(tmp_path).batches[batch.id].status == "in_progress"
    again, desk = opened(tmp_path), Desk()
    async with running(again, desk):
        await until(is_over(again, batch))
    assert again.batches[batch.id].status == "completed"
    assert sorted(answers(again, batch)) == sorted(names)
    assert 100 <= len(desk.asked) <= 300, "60 lines or more of each turn stood there, 100 at most"
