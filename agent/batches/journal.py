"""The two files that a running batch writes, which are its journal too: whatever line stands in them has its answer.

A line is appended whole or not at all, and reaches the disk with a group of others. After a kill what stands there counts; after a power
cut what was torn is cut off, and its lines are asked again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.batches.line import Line, Reply, added, answered_line, counted, number_of, read_line, unanswered_line
from agent.batches.record import Batch, Counts, LineError
from models.durable import sync

logger = logging.getLogger(__name__)

GROUP_LINES = 64
GROUP_S = 2.0
WRITTEN_MAX_BYTES = 256 << 20  # a line of ours is bounded by what an endpoint answers; a longer one is not ours


class InputLost(Exception):
    """The input of a batch cannot be read any more, or not all of it."""


class Lines:
    """The lines of an input file one after another, never more than one in memory; those beyond `most` come as one error. Blocks.

    Raises InputLost, where it is made and with each line.
    """

    def __init__(self, file: Path, endpoint: str, most: int, most_bytes: int) -> None:
        try:
            self._stream = file.open("rb")
        except OSError as error:
            raise InputLost(error.strerror) from error
        self._endpoint = endpoint
        self._most = most
        self._most_bytes = most_bytes
        self._number = 0

    def next(self) -> Line | LineError | None:
        """None: that was all. Empty lines count as lines and are passed over."""
        while self._number <= self._most and (raw := self._read(self._most_bytes + 1)):
            self._number += 1
            if self._number > self._most:
                return LineError(code="too_many_lines", message=f"The file has more than {self._most} lines, the limit of this node.")
            if len(raw) > self._most_bytes:
                while not raw.endswith(b"\n") and (raw := self._read(self._most_bytes)):
                    pass
                message = f"This line has more than {self._most_bytes} bytes, the limit of this node."
                return LineError(code="line_too_long", message=message, line=self._number)
            if raw.strip():
                return read_line(self._number, raw, self._endpoint)
        return None

    def _read(self, most_bytes: int) -> bytes:
        try:
            return self._stream.readline(most_bytes)
        except OSError as error:
            raise InputLost(error.strerror) from error

    def close(self) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[Line | LineError]:
        while (line := self.next()) is not None:
            yield line


class Journal:
    """Blocking; one caller at a time. All methods that write raise OSError; called again they write what is not written yet, and sync.

    `has_room(bytes)`: whether the disk may be given so much more.
    """

    def __init__(self, batch: Batch, output: Path, errors: Path, has_room: Callable[[int], bool]) -> None:
        self._batch = batch
        self._has_room = has_room
        self.counts = Counts()
        self._done: set[int] = set()
        self._unsynced, self._synced_s = 0, time.monotonic()
        self._output = self._opened(output)
        try:
            self._errors = self._opened(errors)
        except BaseException:
            os.close(self._output)
            raise

    def is_done(self, number: int) -> bool:
        return number in self._done

    def answer(self, line: Line, reply: Reply) -> None:
        if not self.is_done(line.number):
            written, counts = answered_line(self._batch.id, line, reply)
            self._append(self._output if counts.completed else self._errors, line.number, written, counts)
        self._sync_now_and_then()

    def leave(self, lines: Lines, code: str) -> None:
        """Every line without an answer gets this code for one. Raises InputLost."""
        for line in lines:
            if isinstance(line, Line) and not self.is_done(line.number):
                self._append(self._errors, line.number, unanswered_line(self._batch.id, line, code), Counts(failed=1))
            self._sync_now_and_then()

    def sync(self) -> None:
        os.fsync(self._output)
        os.fsync(self._errors)
        self._unsynced, self._synced_s = 0, time.monotonic()

    def close(self) -> None:
        os.close(self._output)
        os.close(self._errors)

    def _sync_now_and_then(self) -> None:
        if self._unsynced >= GROUP_LINES or time.monotonic() - self._synced_s >= GROUP_S:
            self.sync()

    def _append(self, descriptor: int, number: int, written: bytes, counts: Counts) -> None:
        """All of it, or nothing and OSError."""
        if not self._has_room(len(written)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        before = os.fstat(descriptor).st_size
        try:
            rest = memoryview(written)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, before)
            raise
        self._done.add(number)
        self.counts = added(self.counts, counts)
        self._unsynced += 1

    def _opened(self, file: Path) -> int:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            sync(file.parent)
            good_bytes = self._recall(file)
            if good_bytes < os.fstat(descriptor).st_size:
                logger.warning("batch %s: the end of %s was torn and is cut off; its lines are asked again", self._batch.id, file.name)
                os.ftruncate(descriptor, good_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _recall(self, file: Path) -> int:
        """Note what stands in a file; how many of its bytes are good."""
        good_bytes = 0
        with file.open("rb") as stream:
            while written := stream.readline(WRITTEN_MAX_BYTES):
                number, counts = number_of(written), _counts_of(written)
                if number is None or counts is None or number in self._done:
                    break
                self._done.add(number)
                self.counts = added(self.counts, counts)
                good_bytes += len(written)
        return good_bytes


def _counts_of(written: bytes) -> Counts | None:
    """What a line of ours counts for; None where it is none."""
    try:
        response = json.loads(written)["response"]
        return counted(response["body"]) if response is not None and response["status_code"] == 200 else Counts(failed=1)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
