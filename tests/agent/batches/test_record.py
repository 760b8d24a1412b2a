"""The states of a batch, and which files go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.batches.record import Batch, Counts, FileRecord, LineError, Status, ended, failed, finalizing, told_to_stop, validated
from agent.batches.retention import BLOCK_BYTES, Keep, batches_to_go, files_to_go, in_use

NOW = 1_800_000_000
BATCH = Batch(
    id="batch_1", owner="", endpoint="/v1/embeddings", input_file_id="file-i", output_id="file-o", error_id="file-e",
    created_at=NOW, expires_at=NOW + 86400, output_expires_s=3600,
)  # fmt: skip
STEPS: dict[str, Callable[[Batch, int], Batch]] = {
    "validated": lambda batch, now: validated(batch, 9, now),
    "failed": lambda batch, now: failed(batch, (LineError(code="x", message="y"),), now),
    "stop": told_to_stop,
    "finalizing": finalizing,
    "ended": lambda batch, now: ended(batch, Counts(completed=9), True, False, now),
}
MAY_FOLLOW: dict[Status, set[Status]] = {
    "validating": {"in_progress", "failed", "cancelling", "expired"},
    "in_progress": {"finalizing", "failed", "cancelling", "expired"},
    "finalizing": {"completed", "failed"},
    "cancelling": {"cancelled", "failed"},
    "completed": set(),
    "failed": set(),
    "expired": set(),
    "cancelled": set(),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=12))
def test_whatever_comes_in_whatever_order_a_batch_goes_the_way_that_is_drawn(steps: Sequence[str]) -> None:
    batch = BATCH
    for number, name in enumerate(steps):
        before, batch = batch, STEPS[name](batch, NOW + number)
        if batch is before:
            continue
        assert batch.status in MAY_FOLLOW[before.status]
        assert getattr(batch, f"{batch.status}_at") == NOW + number
        assert Batch.model_validate_json(batch.model_dump_json()) == batch


def test_a_window_passes_only_for_what_has_no_end_yet() -> None:
    assert BATCH.is_late(NOW + 86400)
    assert not BATCH.is_late(NOW + 86399)
    assert not finalizing(validated(BATCH, 1, NOW), NOW).is_late(NOW + 10**6)
    assert ended(BATCH, Counts(failed=4), False, True, NOW).total == 4, (
        "one that expired before it was looked at has its lines all the same"
    )


def file(number: int, size: int, expires_at: int = NOW + 100) -> FileRecord:
    return FileRecord(id=str(number), owner="", filename="", purpose="batch", bytes=size, created_at=number, expires_at=expires_at)


@given(
    st.lists(st.tuples(st.integers(0, 50_000), st.booleans(), st.booleans()), max_size=30), st.integers(1, 500_000), st.integers(0, 100_000)
)
def test_the_oldest_go_until_there_is_room_and_no_more(files: list[tuple[int, bool, bool]], total: int, more: int) -> None:
    records = [file(number, size, NOW if is_old else NOW + 100) for number, (size, is_old, _) in enumerate(files)]
    used = [str(number) for number, (_, _, is_used) in enumerate(files) if is_used]
    going = files_to_go(records, used, Keep(total, 1), more, NOW)
    assert not set(going) & set(used)
    assert len(set(going)) == len(going)
    kept = [one for one in records if one.id not in going]
    assert all(one.id in used or one.expires_at > NOW for one in kept)
    by_age = [one for one in records if one.id not in used and one.expires_at > NOW]
    pushed = [one for one in by_age if one.id in going]
    assert by_age[: len(pushed)] == pushed
    taken = sum(BLOCK_BYTES + one.bytes for one in kept) + more
    assert taken <= total or all(one.id in used for one in kept)
    if pushed:
        assert taken + BLOCK_BYTES + pushed[-1].bytes > total


def test_records_of_batches_go_when_they_are_old_and_over() -> None:
    over = ended(BATCH, Counts(), False, False, NOW)
    assert batches_to_go([BATCH, over], Keep(1, 50), NOW + 60) == ["batch_1"]
    assert batches_to_go([BATCH], Keep(1, 50), NOW + 60) == []
    assert in_use([BATCH, over.model_copy(update={"input_file_id": "file-x"})]) == {"file-i", "file-o", "file-e"}


@pytest.mark.parametrize("text", ["{}", '{"id": "batch_1"}', "", "[]"])
def test_a_record_is_read_strictly(text: str) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Batch.model_validate_json(text)
