"""The states of a batch, and which files go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.batches.record import Batch, Counts, FileRecord, LineError, Status, ended, failed, finalizing, restamped, told_to_stop, validated
from agent.batches.retention import BLOCK_BYTES, FRESH_S, MOST_FILES, Keep, batches_to_go, expired, in_use, too_much

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


def file(number: int, size: int, expires_at: int = NOW + 100, **changes: Any) -> FileRecord:
    made = FileRecord(id=str(number), owner="", filename="", purpose="batch", bytes=size, created_at=number, expires_at=expires_at)
    return made.model_copy(update=changes)


@given(
    st.lists(st.tuples(st.integers(0, 50_000), st.booleans(), st.booleans()), max_size=30), st.integers(1, 500_000), st.integers(0, 100_000)
)
def test_the_oldest_go_until_there_is_room_and_no_more(files: list[tuple[int, bool, bool]], total: int, more: int) -> None:
    records = [file(number, size, purpose="batch_output" if is_output else "batch") for number, (size, is_output, _) in enumerate(files)]
    used = [str(number) for number, (_, _, is_used) in enumerate(files) if is_used]
    for now in (FRESH_S - 1, NOW):
        stays = {one.id for one in records if one.id in used or (one.purpose == "batch_output" and now < one.created_at + FRESH_S)}
        going = too_much(records, used, Keep(total, 1), more, now)
        assert not set(going) & stays
        assert len(set(going)) == len(going)
        kept = [one for one in records if one.id not in going]
        by_age = [one for one in records if one.id not in stays]
        pushed = [one for one in by_age if one.id in going]
        assert by_age[: len(pushed)] == pushed
        taken = sum(BLOCK_BYTES + one.bytes for one in kept) + more
        assert taken <= total or {one.id for one in kept} == stays
        if pushed:
            assert taken + BLOCK_BYTES + pushed[-1].bytes > total


def test_who_needs_room_gives_of_its_own_first() -> None:
    records = [file(1, 0, owner="aa"), file(2, 0, owner="bb"), file(3, 0, owner="bb"), file(4, 0, owner="cc")]
    assert too_much(records, (), Keep(4 * BLOCK_BYTES, 1), 3 * BLOCK_BYTES, NOW, "bb") == ["2", "3", "1"]
    assert too_much(records, (), Keep(4 * BLOCK_BYTES, 1), 3 * BLOCK_BYTES, NOW) == ["1", "2", "3"]


def test_so_many_files_go_in_any_case() -> None:
    outputs = [file(number, 0, purpose="batch_output") for number in range(MOST_FILES + 2)]
    assert too_much(outputs, ("0",), Keep(1 << 40, 1), 0, 5) == ["1", "2"]


def test_what_expires_goes_unless_it_is_used() -> None:
    assert expired([file(1, 0, NOW), file(2, 0, NOW), file(3, 0, NOW + 1)], ("2",), NOW) == ["1"]


def test_records_of_batches_go_when_they_are_over_long_enough() -> None:
    over = ended(BATCH, Counts(), False, False, NOW + 70)
    assert batches_to_go([BATCH, over], Keep(1, 50), NOW + 120) == ["batch_1"]
    assert batches_to_go([BATCH, over], Keep(1, 50), NOW + 119) == [], "it has run longer than a record is kept"
    assert batches_to_go([BATCH], Keep(1, 50), NOW + 120) == []
    assert in_use([BATCH, over.model_copy(update={"input_file_id": "file-x"})]) == {"file-i", "file-o", "file-e"}


def test_what_was_made_before_the_clock_was_set_begins_when_it_is() -> None:
    unsure = validated(BATCH.model_copy(update={"is_clock_sure": False}), 4, NOW + 5)
    assert not unsure.is_late(NOW + 10**6)
    begun = restamped(unsure, NOW + 10**6)
    assert (begun.created_at, begun.in_progress_at, begun.completed_at) == (NOW + 10**6, NOW + 10**6 + 5, None)
    assert begun.is_late(NOW + 10**6 + 86400)
    assert not begun.is_late(NOW + 10**6 + 86399)


@pytest.mark.parametrize("text", ["{}", '{"id": "batch_1"}', "", "[]"])
def test_a_record_is_read_strictly(text: str) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Batch.model_validate_json(text)
