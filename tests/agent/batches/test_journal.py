"""The files that a running batch writes: torn ends, kills, full disks, and no more memory than a line."""

from __future__ import annotations

import errno
import json
import os
import resource
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.batches.journal import Journal, Lines
from agent.batches.line import Line, Reply
from agent.batches.record import Batch, Counts, LineError
from agent.batches.validation import MOST_ERRORS, validate
from tests.agent.batches.rooms import jsonl, request
from tests.agent.batches.test_record import BATCH

CHAT = "/v1/chat/completions"
GOOD = Reply(200, b'{"usage": {"prompt_tokens": 2, "completion_tokens": 1}}', "req_1")
BAD = Reply(400, b'{"error": {"code": "invalid_value"}}', "req_2")


@contextmanager
def journal_in(folder: Path, batch: Batch = BATCH, has_room: bool = True) -> Iterator[Journal]:
    journal = Journal(batch, folder / "output.jsonl", folder / "error.jsonl", lambda _: has_room)
    try:
        yield journal
    finally:
        journal.close()


def line(number: int) -> Line:
    return Line(number, f"c{number}", b"{}")


def test_what_stands_there_is_done_and_counted_anew(tmp_path: Path) -> None:
    with journal_in(tmp_path) as journal:
        for number in (3, 1, 2):
            journal.answer(line(number), BAD if number == 1 else GOOD)
        counts = journal.counts
    assert counts == Counts(completed=2, failed=1, input_tokens=4, output_tokens=2)
    with journal_in(tmp_path) as journal:
        assert journal.counts == counts
        assert [journal.is_done(number) for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert [json.loads(text)["custom_id"] for text in (tmp_path / "output.jsonl").read_text().splitlines()] == ["c3", "c2"]
    assert (tmp_path / "output.jsonl").stat().st_mode & 0o777 == 0o600


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.binary(max_size=60))
def test_a_torn_end_is_cut_off_and_its_lines_are_asked_again(tmp_path_factory: pytest.TempPathFactory, cut: int, noise: bytes) -> None:
    folder = tmp_path_factory.mktemp("torn")
    with journal_in(folder) as journal:
        for number in (1, 2, 3):
            journal.answer(line(number), GOOD)
    file = folder / "output.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[: max(0, len(whole) - cut)] + noise.replace(b"\n", b" "))
    with journal_in(folder) as journal:
        for number in (1, 2, 3):
            if not journal.is_done(number):
                journal.answer(line(number), GOOD)
        assert journal.counts.completed == 3
    assert sorted(json.loads(text)["custom_id"] for text in file.read_text().splitlines()) == ["c1", "c2", "c3"]


def test_zeros_and_repetitions_after_a_power_cut_are_cut_off_too(tmp_path: Path) -> None:
    with journal_in(tmp_path) as journal:
        journal.answer(line(1), GOOD)
    file = tmp_path / "output.jsonl"
    whole = file.read_bytes()
    for tail in (b"\0" * 4096, whole, b"{}\n", b'{"id":"batch_req_1_2","response":7}\n'):
        file.write_bytes(whole + tail)
        with journal_in(tmp_path) as journal:
            assert journal.counts.answered == 1
        assert file.read_bytes() == whole


def test_a_full_disk_takes_no_part_of_a_line(tmp_path: Path) -> None:
    with journal_in(tmp_path, has_room=False) as journal, pytest.raises(OSError, match="No space"):
        journal.answer(line(1), GOOD)
    with journal_in(tmp_path) as journal:
        journal.answer(line(1), GOOD)
        size = (tmp_path / "output.jsonl").stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # the next write is cut short by the kernel
        try:
            with pytest.raises(OSError, match="too large"):
                journal.answer(line(2), GOOD)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "output.jsonl").stat().st_size == size
        assert not journal.is_done(2)
        journal.answer(line(2), GOOD)
    with journal_in(tmp_path) as journal:
        assert journal.counts.completed == 2


def test_a_disk_that_does_not_sync_is_given_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl([request(f"c{number}") for number in range(1, 4)]))

    def again_and_again(call: Callable[[], None]) -> None:
        """It fails three times before the disk takes it."""
        with monkeypatch.context() as disk:
            disk.setattr("agent.batches.journal.GROUP_LINES", 1)
            disk.setattr(os, "fsync", no_sync)
            for _ in range(3):
                with pytest.raises(OSError, match="Input/output"):
                    call()
        call()

    def leave() -> None:
        lines = Lines(source, CHAT, 50_000, 1 << 20)
        try:
            journal.leave(lines, "batch_expired")
        finally:
            lines.close()

    with journal_in(tmp_path) as journal:
        again_and_again(lambda: journal.answer(line(1), GOOD))
        assert journal.counts == Counts(completed=1, input_tokens=2, output_tokens=1)
        again_and_again(leave)
        assert journal.counts == Counts(completed=1, failed=2, input_tokens=2, output_tokens=1)
    with journal_in(tmp_path) as journal:
        assert journal.counts.answered == 3
    assert len((tmp_path / "output.jsonl").read_bytes().splitlines()) == 1
    assert len((tmp_path / "error.jsonl").read_bytes().splitlines()) == 2


def no_sync(_: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_what_had_no_turn_gets_a_line_of_its_own(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl([request(f"c{number}") for number in range(1, 6)]))
    with journal_in(tmp_path) as journal:
        journal.answer(line(2), GOOD)
        for _ in range(2):  # after a failure in the middle it is done again
            lines = Lines(source, CHAT, 50_000, 1 << 20)
            journal.leave(lines, "batch_expired")
            lines.close()
        assert journal.counts == Counts(completed=1, failed=4, input_tokens=2, output_tokens=1)
    left = [json.loads(text) for text in (tmp_path / "error.jsonl").read_text().splitlines()]
    assert [one["custom_id"] for one in left] == ["c1", "c3", "c4", "c5"]
    assert {one["error"]["code"] for one in left} == {"batch_expired"}


# ── the input ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def errors_of(folder: Path, content: bytes, most_lines: int = 50, line_bytes: int = 1000) -> tuple[int, list[tuple[int | None, str]]]:
    source = folder / "in.jsonl"
    source.write_bytes(content)
    total, errors = validate(source, CHAT, most_lines, line_bytes)
    return total, [(error.line, error.code) for error in errors]


def test_each_fault_is_told_with_its_line(tmp_path: Path) -> None:
    good = [request("a"), request("b")]
    assert errors_of(tmp_path, jsonl(good)) == (2, [])
    assert errors_of(tmp_path, b"\n" + jsonl(good[:1]) + b"  \r\n" + jsonl(good[1:]).rstrip()) == (2, [])
    assert errors_of(tmp_path, b"") == (0, [(None, "empty_file")])
    assert errors_of(tmp_path, b"\n\n") == (0, [(None, "empty_file")])
    assert errors_of(tmp_path, jsonl(good) + b"{]\n" + jsonl(good)) == (
        4, [(3, "invalid_json_line"), (4, "duplicate_custom_id"), (5, "duplicate_custom_id")],
    )  # fmt: skip
    long = jsonl([request("long", "x" * 5000)])
    assert errors_of(tmp_path, long + jsonl(good)) == (2, [(1, "line_too_long")])
    assert errors_of(tmp_path, jsonl([request(str(number)) for number in range(51)]))[1] == [(None, "too_many_lines")]
    assert errors_of(tmp_path, b"\n" * 1000)[1] == [(None, "too_many_lines")]
    assert len(errors_of(tmp_path, b"x\n" * 10_000, most_lines=100_000)[1]) == MOST_ERRORS


def test_an_input_of_any_size_takes_the_memory_of_a_line(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    one = json.dumps(request("ID", "x" * 2000)) + "\n"
    with source.open("w") as stream:
        for number in range(10_000):
            stream.write(one.replace("ID", f"{number:08d}"))
        stream.write("y" * (20 << 20))  # and one line without an end
    assert source.stat().st_size > 40 << 20
    tracemalloc.start()
    try:
        total, errors = validate(source, CHAT, 50_000, 1 << 20)
        lines = Lines(source, CHAT, 50_000, 1 << 20)
        assert sum(isinstance(line, Line) for line in lines) == 10_000
        lines.close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (total, [error.code for error in errors]) == (10_000, ["line_too_long"])
    assert isinstance(errors[0], LineError)
    assert peak < 12 << 20
