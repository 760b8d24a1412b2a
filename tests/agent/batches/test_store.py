"""Files and records on the disk: through a new start, damage, time and a full disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.batches.record import ended, told_to_stop, validated
from agent.batches.store import NoRoom
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
    assert not again.content(bad.id).exists()


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
