"""Files and records of batches in the node's state folder, and what is known of them in memory.

    files/ID.json     record of a file; written last, so that a file without one is none
    files/ID.jsonl    its content; of an output, from the first answer on
    batches/ID.json   record of a batch

Everything is readable by the node alone. Records change on the event loop, one after another; what is in memory is what is on the disk.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
from anyio import to_thread

from agent.batches.record import Batch, Counts, FileRecord, Kept, Kind, restamped
from agent.batches.retention import Keep, batches_to_go, expired, in_use, is_fresh, taken_bytes, too_much
from models.durable import publish, sync, write_atomically

logger = logging.getLogger(__name__)

UPLOAD_PREFIX = ".upload."
DAMAGED = ".damaged"


class NoRoom(Exception):
    """The disk, or what this node gives of it to files, is full; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """`keep_free_bytes`: left to the rest of the node, whatever the budget says."""

    file_bytes: int
    keep: Keep
    keep_free_bytes: int


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


class BatchStore:
    """`open` once, then `files` and `batches` are all there are. `on_change`: a batch is new or was changed.

    clock   seconds since 1970
    clock_is_sure   whether it has been set; until then nothing is late or too old
    live   counts of those that run, which their records have at their end only
    """

    def __init__(
        self,
        root: Path,
        limits: StoreLimits,
        clock: Callable[[], float],
        clock_is_sure: Callable[[], bool],
        free_bytes: Callable[[Path], int] = free_bytes,
    ) -> None:
        self.limits = limits
        self.clock = clock
        self.clock_is_sure = clock_is_sure
        self.files: dict[str, FileRecord] = {}
        self.batches: dict[str, Batch] = {}
        self.live: dict[str, Counts] = {}
        self.on_change: Callable[[], None] = lambda: None
        self._free_bytes = free_bytes
        self._files = root / "files"
        self._batches = root / "batches"
        self._changing = anyio.Lock()
        self._tidying = anyio.Lock()

    # ── in a thread ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self) -> None:
        """Read what is there; what a kill left half-done goes. Raises OSError."""
        for folder in (self._files.parent, self._files, self._batches):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.files = {file.id: file for file in _records(self._files, FileRecord) if self.content(file.id).is_file()}
        self.batches = {batch.id: batch for batch in _records(self._batches, Batch)}
        known = self.files.keys() | in_use(self.batches.values()) | {file.stem for file in self._files.glob(f"*{DAMAGED}")}
        is_known = any(self._batches.glob(f"*{DAMAGED}"))  # by a record that cannot be read: then no content is nobody's
        for file in self._files.iterdir():
            if file.name.startswith(".") or (file.stem not in known and not is_known):
                file.unlink()
        for file in self._batches.glob(".*"):
            file.unlink()

    def content(self, file: str) -> Path:
        """Where the content of a file is; `file` is an identifier of ours, never a client's word."""
        return self._files / f"{file}.jsonl"

    def has_room(self, more_bytes: int) -> bool:
        return self._free_bytes(self._files) - more_bytes >= self.limits.keep_free_bytes

    # ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def file(self, identifier: str, owner: str) -> FileRecord | None:
        """One of the owner's; without an owner (no key is asked for) anyone's."""
        file = self.files.get(identifier)
        return file if file is not None and owner in ("", file.owner) else None

    def using(self, file: str) -> Batch | None:
        """A batch that reads or writes this file and is not over."""
        return next((batch for batch in self.unfinished() if file in (batch.input_file_id, batch.output_id, batch.error_id)), None)

    async def begin_upload(self) -> Path:
        """An empty file to write into; `add` or `drop_upload` it. Raises NoRoom."""
        return await to_thread.run_sync(self._new_upload)

    async def may_come(self, more_bytes: int) -> None:
        """Whether there would be room for so much if all went that may go. Raises NoRoom."""
        used, now, keep = in_use(self.batches.values()), self.clock(), self.limits.keep
        taken = taken_bytes(file for file in self.files.values() if file.id in used or is_fresh(file, now)) + await self._growing_bytes()
        if taken + more_bytes > keep.total_bytes:
            raise NoRoom(
                f"batches that are not over, and outputs of the last day, take {taken >> 20} of {keep.total_bytes >> 20} MB "
                "(batches.budget_mb); wait for those batches, cancel one, delete outputs, or raise the budget"
            )
        await self.room_on_disk(more_bytes)

    async def _growing_bytes(self) -> int:
        """What batches that are not over have written so far."""
        outputs = {name for batch in self.unfinished() for name in (batch.output_id, batch.error_id)} - self.files.keys()
        return await to_thread.run_sync(lambda: sum(size_of(self.content(name)) for name in outputs))

    async def _room_for(self, more_bytes: int, owner: str) -> None:
        """Let the oldest files go that are in no use, if there must be, the owner's own first. Raises NoRoom."""
        await self.may_come(more_bytes)
        await self.tidy(more_bytes, owner)

    async def room_on_disk(self, more_bytes: int) -> None:
        """Raises NoRoom."""
        if not await to_thread.run_sync(self.has_room, more_bytes):
            raise NoRoom(
                f"the disk of this node is full: {self.limits.keep_free_bytes >> 20} MB must stay free (batches.keep_free_mb); delete "
                "files, or send a smaller one"
            )

    async def add(self, upload: Path, size: int, owner: str, filename: str, expires_s: int) -> FileRecord:
        """Make an upload of `size` bytes a file. Raises NoRoom; then it is gone."""
        now = int(self.clock())
        try:
            await self._room_for(size, owner)
            file = FileRecord(
                id=new_id("file-"), owner=owner, filename=filename, purpose="batch", bytes=size, created_at=now, expires_at=now + expires_s,
                is_clock_sure=self.clock_is_sure(),
            )  # fmt: skip
            await to_thread.run_sync(self._publish, upload, file)
        except OSError as error:
            raise no_room(error) from error
        finally:
            await self.drop_upload(upload)
        self.files[file.id] = file
        return file

    async def drop_upload(self, upload: Path) -> None:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(lambda: upload.unlink(missing_ok=True))

    async def add_output(self, batch: Batch, identifier: str, which: str) -> bool:
        """Make what a batch has written a file, if it is anything. Raises OSError; may be done again."""
        now = int(self.clock())

        def publish_it() -> FileRecord | None:
            content = self.content(identifier)
            size = size_of(content)
            if not size:
                content.unlink(missing_ok=True)
                return None
            sync(content)
            name, expires_at = f"{batch.id}_{which}.jsonl", now + batch.output_expires_s
            file = FileRecord(
                id=identifier, owner=batch.owner, filename=name, purpose="batch_output", bytes=size, created_at=now, expires_at=expires_at,
                is_clock_sure=self.clock_is_sure(),
            )  # fmt: skip
            self._write(self._files, file.id, file)
            return file

        file = await to_thread.run_sync(publish_it)
        if file is not None:
            self.files[file.id] = file
        return file is not None

    async def delete(self, identifier: str) -> None:
        """Raises OSError."""
        self.files.pop(identifier, None)
        await to_thread.run_sync(self._unlink, self._files, identifier)

    # ── batches ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def batch(self, identifier: str, owner: str) -> Batch | None:
        batch = self.batches.get(identifier)
        return batch if batch is not None and owner in ("", batch.owner) else None

    def unfinished(self) -> Iterator[Batch]:
        """The oldest first."""
        return (batch for batch in list(self.batches.values()) if not batch.is_over)

    def counts(self, batch: Batch) -> Counts:
        return self.live.get(batch.id, batch.counts)

    def is_late(self, batch: Batch) -> bool:
        return self.clock_is_sure() and batch.is_late(self.clock())

    async def add_batch(self, batch: Batch) -> None:
        """Raises NoRoom."""
        try:
            await to_thread.run_sync(self._write, self._batches, batch.id, batch)
        except OSError as error:
            raise no_room(error) from error
        self.batches[batch.id] = batch
        self.on_change()

    async def change(self, identifier: str, transition: Callable[[Batch], Batch]) -> Batch:
        """Put one batch into another state. Raises OSError, and then it is as before."""
        async with self._changing:
            before = self.batches[identifier]
            after = transition(before)
            if after is not before:
                await to_thread.run_sync(self._write, self._batches, identifier, after)
                self.batches[identifier] = after
                self.on_change()
            return after

    async def tidy(self, more_bytes: int = 0, owner: str | None = None) -> None:
        """Let go what is too old, and what is too much where `more_bytes` of `owner` come. Raises OSError; may be called by several."""
        async with self._tidying:
            now, keep, is_sure = self.clock(), self.limits.keep, self.clock_is_sure()
            if is_sure:
                await self._restamp(int(now))
            old = now if is_sure else -math.inf
            for identifier in batches_to_go(self.batches.values(), keep, old):
                self.batches.pop(identifier)
                await to_thread.run_sync(self._unlink, self._batches, identifier)
            await self._delete_unused(expired(self.files.values(), in_use(self.batches.values()), old))
            more_bytes += await self._growing_bytes()
            await self._delete_unused(too_much(self.files.values(), in_use(self.batches.values()), keep, more_bytes, now, owner))

    async def _delete_unused(self, identifiers: list[str]) -> None:
        for identifier in identifiers:
            if self.using(identifier) is None:  # a batch may have been ordered meanwhile
                await self.delete(identifier)

    async def _restamp(self, now: int) -> None:
        """Now that the clock is set, give times to what was made before."""
        for batch in [batch for batch in self.batches.values() if not batch.is_clock_sure]:
            await self.change(batch.id, partial(restamped, now=now))
        for file in [restamped(file, now) for file in self.files.values() if not file.is_clock_sure]:
            await to_thread.run_sync(self._write, self._files, file.id, file)
            if file.id in self.files:  # nobody has deleted it meanwhile
                self.files[file.id] = file

    # ── the disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _new_upload(self) -> Path:
        try:
            descriptor, name = tempfile.mkstemp(dir=self._files, prefix=UPLOAD_PREFIX)  # 0600
        except OSError as error:
            raise no_room(error) from error
        os.close(descriptor)
        return Path(name)

    def _publish(self, upload: Path, file: FileRecord) -> None:
        content = self.content(file.id)
        publish(upload, content)
        try:
            self._write(self._files, file.id, file)
        except OSError:
            content.unlink()
            raise

    def _write(self, folder: Path, identifier: str, record: Kept) -> None:
        write_atomically(folder / f"{identifier}.json", record.model_dump_json().encode(), 0o600)

    def _unlink(self, folder: Path, identifier: str) -> None:
        """The record first: content without one is none."""
        (folder / f"{identifier}.json").unlink(missing_ok=True)
        (folder / f"{identifier}.jsonl").unlink(missing_ok=True)
        sync(folder)


def size_of(content: Path) -> int:
    return content.stat().st_size if content.exists() else 0


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def no_room(error: OSError) -> NoRoom:
    """What a failed write comes to in words."""
    words = {errno.ENOSPC: "the disk of this node is full", errno.EDQUOT: "the disk quota of this node is used up"}
    what = words.get(error.errno or 0, f"this node cannot write: {error.strerror}")
    return NoRoom(f"{what}; nothing was kept, make room and try again")


def _records(folder: Path, kind: type[Kind]) -> list[Kind]:
    """The oldest first. They are written atomically: one that cannot be read was damaged by the disk, or written by another version, and is
    moved aside, with a line in the log."""
    found = []
    for file in folder.glob("*.json"):
        try:
            record = kind.model_validate_json(file.read_bytes())
            if record.id != file.stem:
                raise ValueError(f"it says that it is {record.id[:80]!r}")
        except ValueError as error:  # pydantic's is one
            aside = file.replace(file.with_suffix(DAMAGED))
            why = str(error).splitlines()[:2]
            logger.error("%s is damaged (%s); it was moved to %s, and no content that may be its goes", file, why, aside)  # noqa: TRY400
            continue
        found.append(record)
    return sorted(found, key=lambda record: record.created_at)
