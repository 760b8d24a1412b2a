"""What is kept of a file and of a batch, and the states that a batch goes through: frozen values and pure transitions.

    validating → in_progress → finalizing → completed
         │            ├──────────────────→ expired
         └→ failed    └→ cancelling ─────→ cancelled        (from validating too)

The words are those of OpenAI's API. A transition that does not fit the state of a batch changes nothing: two may come at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Kind = TypeVar("Kind", bound="Kept")
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
Purpose = Literal["batch", "batch_output"]
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]

STATUSES: tuple[Status, ...] = ("validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled")
OVER: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})
WINDOW_S = 24 * 3600


class Record(BaseModel):
    """Read back from the disk by whatever version comes after this one, so unknown fields are let in."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Kept(Record):
    """`owner`: digest of the API key that it belongs to, in hex; empty: made while no key was asked for.

    `is_clock_sure`: whether the clock had been set when it was made; what was made before has its times from `restamped` once it is.
    """

    id: str
    owner: str
    created_at: int
    expires_at: int
    is_clock_sure: bool = True


def restamped(record: Kind, now: int) -> Kind:
    """The record as if it were made now; all its times move along."""
    moved = {name: value + now - record.created_at for name, value in record if name.endswith("_at") and value is not None}
    return record.model_copy(update={**moved, "is_clock_sure": True})


class FileRecord(Kept):
    """A file that is complete."""

    filename: str
    purpose: Purpose
    bytes: int = Field(ge=0)


class LineError(Record):
    """What is wrong with the input; `line` counts from 1, None: with the file as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Counts(Record):
    """Lines that have an answer, and the tokens of those that succeeded."""

    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def answered(self) -> int:
        return self.completed + self.failed


NO_COUNTS = Counts()


class Batch(Kept):
    """One batch; `expires_at` ends its window. `output_id` and `error_id` are names of files that come to be when it ends.

    total   requests in its input, known once it is validated
    output_expires_s   how long its output is kept
    has_output, has_errors   whether those files came to be
    """

    endpoint: Endpoint
    input_file_id: str
    output_id: str
    error_id: str
    output_expires_s: int
    metadata: Mapping[str, str] | None = None
    status: Status = "validating"
    total: int = 0
    counts: Counts = NO_COUNTS
    errors: tuple[LineError, ...] = ()
    has_output: bool = False
    has_errors: bool = False
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def is_over(self) -> bool:
        return self.status in OVER

    @property
    def ended_at(self) -> int:
        """Of one that is over; of any other when it was made."""
        ended: int | None = getattr(self, f"{self.status}_at") if self.is_over else None
        return max(self.created_at, ended or 0)

    def is_late(self, now: float) -> bool:
        """Its window has passed before every line had its answer."""
        return self.is_clock_sure and self.status in ("validating", "in_progress") and now >= self.expires_at


def validated(batch: Batch, total: int, now: int) -> Batch:
    if batch.status != "validating":
        return batch
    return batch.model_copy(update={"status": "in_progress", "total": total, "in_progress_at": now})


def failed(
    batch: Batch, errors: tuple[LineError, ...], now: int, counts: Counts = NO_COUNTS, has_output: bool = False, has_errors: bool = False
) -> Batch:
    """None of it is answered, or no more: its input is not what it must be, or the node failed. What is answered stays."""
    if batch.is_over:
        return batch
    files = _files(batch, counts, has_output, has_errors)
    return batch.model_copy(update={"status": "failed", "errors": errors, "failed_at": now, **files})


def told_to_stop(batch: Batch, now: int) -> Batch:
    if batch.status not in ("validating", "in_progress"):
        return batch
    return batch.model_copy(update={"status": "cancelling", "cancelling_at": now})


def finalizing(batch: Batch, now: int) -> Batch:
    """Every line has its answer."""
    if batch.status != "in_progress":
        return batch
    return batch.model_copy(update={"status": "finalizing", "finalizing_at": now})


def ended(batch: Batch, counts: Counts, has_output: bool, has_errors: bool, now: int) -> Batch:
    """With the files as they are: completed, cancelled, or, where neither fits, expired."""
    if batch.is_over:
        return batch
    ends: dict[Status, Status] = {"finalizing": "completed", "cancelling": "cancelled"}
    status = ends.get(batch.status, "expired")
    return batch.model_copy(update={"status": status, f"{status}_at": now, **_files(batch, counts, has_output, has_errors)})


def _files(batch: Batch, counts: Counts, has_output: bool, has_errors: bool) -> dict[str, object]:
    return {"total": max(batch.total, counts.answered), "counts": counts, "has_output": has_output, "has_errors": has_errors}
