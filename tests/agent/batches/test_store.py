"""Files and records on the disk: through a new start, damage, time and a full disk."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from agent.batches.record import Batch, ended, told_to_stop, validated
from agent.batches.store import BatchStore, NoRoom
from tests.agent.batches.rooms import DAY_S, MONTH_S, Clock, added, jsonl, opened, ordered, request

pytestmark = pytest.mark.anyio


def modes(root: Path) -> dict[str, int]:
    """Name → permissions of every file."""
    return {file.name: file.stat().st_mode & 0o777 for file in root.rglob("*") if file.is_file()}


async def test_a_new_start_finds_everything_and_sweeps_what_was_half_done(tmp_path: Path) -> None:
    store = opened(tmp_path)
    batch = await ordered(store, jsonl([request("a")]), owner="ab")
    await store.change(batch.id, lambda one: validated(one, 1, 5))
    other = await added(store, b"{}\n")
    store.content(batch.output_id).write_bytes(b"an answer\n")  # its journal, not yet a file
    (tmp_path / "files" / ".upload.x").write_bytes(b"half")
    (tmp_path / "files" / "file-orphan.jsonl").write_bytes(b"its record was never written")
    (tmp_path / "batches" / ".batch_x.json.tmp").write_bytes(b"half")
    again = opened(tmp_path)
    assert again.files == store.files
    assert again.batches == store.batches
    assert again.content(batch.output_id).exists()
    assert sorted(file.name for file in (tmp_path / "files").iterdir()) == sorted(
        [*(f"{name}.{kind}" for name in (batch.input_file_id, other.id) for kind in ("json", "jsonl")), f"{batch.output_id}.jsonl"]
    )
    assert all(mode == 0o600 for name, mode in modes(tmp_path).items() if not name.startswith(batch.output_id))


async def test_a_damaged_record_is_told_and_keeps_nothing_from_starting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = opened(tmp_path)
    good, bad = await added(store, b"{}\n"), await added(store, b"{}\n")
    (tmp_path / "files" / f"{bad.id}.json").write_bytes(b'{"id": "../../etc/passwd"')
    liar = (tmp_path / "files" / f"{good.id}.json").read_bytes()
    (tmp_path / "files" / "file-liar.json").write_bytes(liar)
    again = opened(tmp_path)
    assert list(again.files) == [good.id]
    assert len([record for record in caplog.records if "damaged" in record.message]) == 2
    assert again.content(bad.id).exists()
    again = opened(tmp_path)
    assert again.content(bad.id).exists(), "its content is nobody's to throw away"
    assert len([record for record in caplog.records if "damaged" in record.message]) == 2


async def test_a_record_of_another_version_is_moved_aside_and_can_come_back(tmp_path: Path) -> None:
    store = opened(tmp_path)
    batch = await ordered(store, jsonl([request("a")]))
    store.content(batch.output_id).write_bytes(b"an answer\n")
    record = tmp_path / "batches" / f"{batch.id}.json"
    newer = record.read_bytes().replace(b'"validating"', b'"dreaming"')
    record.write_bytes(newer)
    for _ in range(2):
        again = opened(tmp_path)
        assert not again.batches
        assert again.content(batch.output_id).exists()
    aside = record.with_suffix(".damaged")
    aside.write_bytes(aside.read_bytes().replace(b'"dreaming"', b'"validating"'))
    aside.rename(record)
    again = opened(tmp_path)
    assert again.batches == {batch.id: batch}
    assert again.content(batch.output_id).exists()


async def test_owners_are_kept_apart(tmp_path: Path) -> None:
    store = opened(tmp_path)
    batch = await ordered(store, jsonl([request("a")]), owner="ab")
    file = batch.input_file_id
    assert store.file(file, "ab")
    assert store.file(file, "cd") is None
    assert store.file(file, ""), "no key is asked for: everything is shared"
    assert store.batch(batch.id, "ab")
    assert store.batch(batch.id, "cd") is None


async def test_files_and_records_expire_by_the_clock_but_not_while_they_are_used(tmp_path: Path) -> None:
    clock = Clock()
    store = opened(tmp_path, clock)
    batch = await ordered(store, jsonl([request("a")]))
    idle = await added(store, b"{}\n")
    clock.now += MONTH_S - 1
    await store.tidy()
    assert set(store.files) == {idle.id, batch.input_file_id}
    clock.now += 1
    await store.tidy()
    assert set(store.files) == {batch.input_file_id}
    await store.change(batch.id, lambda one: ended(told_to_stop(one, 1), one.counts, False, False, 2))
    clock.now += DAY_S
    await store.tidy()
    assert not store.files
    assert not store.batches
    assert not modes(tmp_path)


async def test_two_may_tidy_at_once(tmp_path: Path) -> None:
    clock = Clock()
    store = opened(tmp_path, clock)
    for _ in range(5):
        batch = await ordered(store, jsonl([request("a")]))
        await store.change(batch.id, lambda one: ended(told_to_stop(one, 1), one.counts, False, False, 2))
    clock.now += MONTH_S
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(store.tidy)
    assert not store.batches
    assert not modes(tmp_path)


async def test_while_nobody_has_set_the_clock_nothing_is_too_old(tmp_path: Path) -> None:
    """Without a battery a device begins in the past, or anywhere."""
    clock = Clock(is_set=False)
    store = opened(tmp_path, clock, total_bytes=3 << 20)
    batch, idle = await ordered(store, jsonl([request("a")])), await added(store, b"{}\n")
    made_s = clock.now
    clock.now += 5 * MONTH_S
    await store.tidy()
    assert set(store.files) == {batch.input_file_id, idle.id}
    assert not store.is_late(batch)
    store = opened(tmp_path, clock, total_bytes=3 << 20)
    clock.is_set = True
    assert not store.is_late(store.batches[batch.id]), "before its first look at what is old too"
    await store.tidy()
    assert set(store.files) == {batch.input_file_id, idle.id}
    again = opened(tmp_path, clock)
    assert (again.files, again.batches) == (store.files, store.batches)
    assert again.batches[batch.id].created_at - made_s == 5 * MONTH_S
    clock.now += DAY_S
    assert store.is_late(store.batches[batch.id])
    clock.is_set = False
    assert not store.is_late(store.batches[batch.id])
    clock.now += 5 * MONTH_S
    await store.tidy()
    assert idle.id in store.files
    await added(store, b"x" * (5 << 19))
    await added(store, b"x" * (5 << 19))
    assert idle.id not in store.files, "the budget needs no clock"


async def finished(store: BatchStore, size: int, owner: str = "") -> Batch:
    """A batch that has written so much, and nothing else."""
    batch = await ordered(store, jsonl([request("a")]), owner)
    store.content(batch.output_id).write_bytes(b"x" * size)
    await store.add_output(batch, batch.output_id, "output")
    return await store.change(batch.id, lambda one: ended(told_to_stop(one, 1), one.counts, True, False, 2))


async def test_an_output_is_not_pushed_out_before_its_owner_had_a_day(tmp_path: Path) -> None:
    clock = Clock()
    store = opened(tmp_path, clock, total_bytes=3 << 20)
    batch = await finished(store, 4 << 20, "aa")
    await store.tidy()
    assert set(store.files) == {batch.output_id}, "more than the budget by itself"
    with pytest.raises(NoRoom, match="budget_mb"):
        await added(store, b"{}\n", "bb")
    clock.now += DAY_S
    await added(store, b"{}\n", "bb")
    assert batch.output_id not in store.files


async def test_who_uploads_pushes_out_its_own_files_first(tmp_path: Path) -> None:
    store = opened(tmp_path, total_bytes=3 << 20)
    other, own = await added(store, b"x" * (1 << 20), "aa"), await added(store, b"x" * (1 << 20), "bb")
    new = await added(store, b"x" * (1 << 20), "bb")
    assert set(store.files) == {other.id, new.id}
    assert own.id not in store.files


async def test_what_a_batch_is_writing_counts(tmp_path: Path) -> None:
    store = opened(tmp_path, total_bytes=3 << 20)
    batch, idle = await ordered(store, jsonl([request("a")])), await added(store, b"x" * (1 << 20))
    store.content(batch.output_id).write_bytes(b"x" * (5 << 19))
    with pytest.raises(NoRoom, match="budget_mb"):
        await added(store, b"x" * (1 << 19))
    await store.tidy()
    assert idle.id not in store.files


async def test_without_room_nothing_is_kept(tmp_path: Path) -> None:
    free = [1 << 40]
    store = opened(tmp_path, total_bytes=1 << 20, free_bytes=free)
    batch = await ordered(store, jsonl([request("a", "x" * (1 << 19))]))
    with pytest.raises(NoRoom, match="budget_mb"):
        await added(store, b"x" * (1 << 20))
    free.append(0)
    with pytest.raises(NoRoom, match="keep_free_mb"):
        await added(store, b"x")
    assert list(store.files) == [batch.input_file_id]
    assert len(list((tmp_path / "files").iterdir())) == 2


async def test_a_change_that_the_disk_does_not_take_is_none(tmp_path: Path) -> None:
    store = opened(tmp_path)
    batch = await ordered(store, jsonl([request("a")]))
    (tmp_path / "batches").rename(tmp_path / "gone")
    (tmp_path / "batches").write_bytes(b"no folder")
    with pytest.raises(OSError, match="batches"):
        await store.change(batch.id, lambda one: validated(one, 1, 5))
    assert store.batches[batch.id] == batch
