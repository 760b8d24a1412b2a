"""Which files go, and which records of batches: pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from agent.batches.record import Batch, FileRecord

BLOCK_BYTES = 4096  # what the smallest file takes, its record beside it
MOST_FILES = 10_000
MOST_BATCHES = 2_000
FRESH_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class Keep:
    """`total_bytes`: of all files together. `age_s`: how long a file, an output and the record of a batch are kept."""

    total_bytes: int
    age_s: int


def taken_bytes(files: Iterable[FileRecord]) -> int:
    return sum(BLOCK_BYTES + file.bytes for file in files)


def in_use(batches: Iterable[Batch]) -> frozenset[str]:
    """Files that batches read, or that come to be when they end."""
    return frozenset(name for batch in batches if not batch.is_over for name in (batch.input_file_id, batch.output_id, batch.error_id))


def is_fresh(file: FileRecord, now: float) -> bool:
    """An output that whoever ordered it may not have fetched yet."""
    return file.purpose == "batch_output" and now < file.created_at + FRESH_S


def expired(files: Iterable[FileRecord], used: Collection[str], now: float) -> list[str]:
    return [file.id for file in files if now >= file.expires_at and file.id not in used]


def too_much(
    files: Collection[FileRecord], used: Collection[str], keep: Keep, more_bytes: int, now: float, owner: str | None = None
) -> list[str]:
    """While with `more_bytes` there would be too much: the oldest that no batch uses, those of `owner` before all others.

    Outputs are safe from the budget while they are fresh, but not from MOST_FILES.
    """
    going = []
    over_bytes = taken_bytes(files) + more_bytes - keep.total_bytes
    surplus = len(files) - MOST_FILES
    for file in sorted(files, key=lambda one: (one.owner != owner, one.created_at)):
        is_wanted = surplus <= 0 and (over_bytes <= 0 or is_fresh(file, now))
        if is_wanted or file.id in used:
            continue
        going.append(file.id)
        over_bytes -= BLOCK_BYTES + file.bytes
        surplus -= 1
    return going


def batches_to_go(batches: Collection[Batch], keep: Keep, now: float) -> list[str]:
    """Those that ended: the old ones, and the oldest beyond MOST_BATCHES."""
    over = sorted((batch for batch in batches if batch.is_over), key=lambda one: one.ended_at)
    surplus = len(batches) - MOST_BATCHES
    return [batch.id for index, batch in enumerate(over) if index < surplus or now >= batch.ended_at + keep.age_s]
