"""Keeps what cameras saw: takes the worker's events without ever waiting, writes them in a thread, and makes room."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import anyio
from anyio import to_thread

from agent.cameras.media import Media, Stored
from agent.cameras.record import EndedBy, EventRecord, NotAnEvent, record_of
from agent.cameras.retention import Aged, Keep, too_much
from agent.cameras.store import EventStore, Filter
from agent.link.store import StoreError
from agent.protocol.wire import Severity, wire_now
from agent.worker_protocol import CameraEvent

logger = logging.getLogger(__name__)

WAITING_EVENTS = 1024
WAITING_BYTES = 32 << 20
SNAPSHOT_MAX_BYTES = 8 << 20
ROOM_EVERY_S = 60.0
ABANDONED_S = 6 * 3600.0  # longer than any clip
RETRY_S = 5.0


@dataclass
class _Waiting:
    """The latest of each event, in the order of their beginning."""

    events: dict[str, tuple[EventRecord, bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class _EndOpen:
    ended_by: EndedBy


class EventKeeper:
    """`offer` and `end_open` come on the event loop and return at once; `run` writes.

    Of an event that waits only its latest state and snapshot are kept. Beyond 1024 waiting events new ones and updates are dropped and
    counted, ends are not; beyond 32 MB of waiting pictures the picture is dropped, not the event. A disk that does not take events is said
    once through `on_note`, and once more when it does again.
    """

    def __init__(
        self,
        store: EventStore,
        media: Media,
        keep: Keep,
        on_note: Callable[[Severity, str], None],
        clock_is_synced: Callable[[], bool],
        retry_s: float = RETRY_S,
        age_s_of: Callable[[str], float | None] = lambda camera: None,
    ) -> None:
        """`age_s_of` a camera: how long its events are kept, None: as `keep` says."""
        self._store = store
        self.media = media
        self._keep = keep
        self._on_note = on_note
        self._clock_is_synced = clock_is_synced
        self._retry_s = retry_s
        self._age_s_of = age_s_of
        self._since = wire_now().timestamp()
        self._jobs: deque[_Waiting | _EndOpen] = deque()
        self._count = self._bytes = 0
        self._came = anyio.Event()
        self._problem = ""
        self.dropped = 0
        self.kept: Mapping[tuple[str, str], int] = {}

    def offer(self, event: CameraEvent, payload: bytes = b"") -> None:
        """Take an `object` event; others are no story that is kept."""
        if event.kind != "object":
            return
        try:
            record = record_of(event.pipeline, event.data, wire_now().timestamp(), self._clock_is_synced())
        except NotAnEvent as error:
            self._drop(str(error))
            return
        jpeg = payload if event.data.get("has_snapshot") and len(payload) <= SNAPSHOT_MAX_BYTES else b""
        waiting = self._jobs[-1] if self._jobs else None
        if not isinstance(waiting, _Waiting):
            waiting = _Waiting()
            self._jobs.append(waiting)
        before = waiting.events.get(record.id)
        if before is None and self._count >= WAITING_EVENTS and record.ended_at is None:
            self._drop("the disk is slower than the cameras")
            return
        if before is not None:
            self._count, self._bytes = self._count - 1, self._bytes - len(before[1])
            if not jpeg:
                jpeg, record = before[1], replace(record, snapshot_box=before[0].snapshot_box)
        if self._bytes + len(jpeg) > WAITING_BYTES:
            jpeg = b""
        waiting.events[record.id] = (record, jpeg)
        self._count, self._bytes = self._count + 1, self._bytes + len(jpeg)
        self._came.set()

    def end_open(self, ended_by: EndedBy) -> None:
        """End what is open now: nobody will say how it ended."""
        if not self._jobs or self._jobs[-1] != _EndOpen(ended_by):
            self._jobs.append(_EndOpen(ended_by))
        self._came.set()

    async def page(self, wanted: Filter, before: int | None, limit: int) -> list[EventRecord]:
        return await to_thread.run_sync(self._store.page, wanted, before, limit)

    async def event(self, identifier: str) -> EventRecord | None:
        return await to_thread.run_sync(self._store.event, identifier)

    def snapshot(self, event: EventRecord) -> Path:
        return self.media.snapshot(event.camera, event.id)

    def clip(self, event: EventRecord) -> Path:
        return self.media.clip(event.camera, event.id)

    async def run(self) -> None:
        """Puts the house in order after the last life of this node, then writes until cancelled."""
        await self._patiently(self._tidy)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._make_room)
            while True:
                await self._came.wait()
                self._came = anyio.Event()
                while self._jobs:
                    await self._patiently(partial(self._write, self._taken()))

    def _taken(self) -> _Waiting | _EndOpen:
        job = self._jobs.popleft()
        if isinstance(job, _Waiting):
            self._count -= len(job.events)
            self._bytes -= sum(len(jpeg) for _, jpeg in job.events.values())
        return job

    async def _patiently(self, work: Callable[[], None]) -> None:
        """What a full disk refuses is tried again until it is taken; meanwhile newer states take the place of older ones in the queue."""
        while True:
            try:
                await to_thread.run_sync(work)
            except (StoreError, OSError) as error:
                if not self._problem:
                    self._problem = str(error)
                    self._on_note("error", f"events are not kept: {error}; the cameras go on, and free space lets it resume")
                    logger.warning("events are not kept: %s", error)
                await self._clear(is_urgent=True)
                await anyio.sleep(self._retry_s)
                continue
            if self._problem:
                self._problem = ""
                self._on_note("info", "events are kept again")
                logger.info("events are kept again")
            return

    def _write(self, job: _Waiting | _EndOpen) -> None:
        if isinstance(job, _EndOpen):
            self._store.end_open(job.ended_by, wire_now().timestamp())
            return
        records = []
        for record, jpeg in job.events.values():
            if jpeg:  # before the row that names it: what a crash leaves is a file too many, which the next start removes
                self.media.keep_snapshot(record.camera, record.id, jpeg)
            records.append(replace(record, has_snapshot=bool(jpeg)))
        taken = self._store.save(records)
        if taken < len(records):
            logger.warning("%d events came again after their end", len(records) - taken)
        kept = dict(self.kept)
        for record in records:
            if record.ended_at is not None:
                key = (record.camera, record.label)
                kept[key] = kept.get(key, 0) + 1
        self.kept = kept  # read by others on the event loop

    def _tidy(self) -> None:
        """What a killed node left: open events, files without an event, events that promise a file that is not there."""
        self._store.end_open("node_restarted", wire_now().timestamp())
        rows = self._store.outline()
        self.media.remove_others({(row.camera, row.id) for row in rows}, self._since)
        found = self.media.scan()
        stored = [(row, found.get((row.camera, row.id), Stored())) for row in rows]
        self._store.forget_files(
            [row.id for row, files in stored if row.has_snapshot and not files.snapshot_bytes],
            [row.id for row, files in stored if row.has_clip and not files.clip_bytes],
        )

    async def _make_room(self) -> None:
        while True:
            await self._clear()
            await anyio.sleep(ROOM_EVERY_S)

    async def _clear(self, is_urgent: bool = False) -> None:
        try:
            await to_thread.run_sync(self._clear_now, is_urgent)
        except (StoreError, OSError) as error:
            if not is_urgent:
                logger.warning("no room was made for new events: %s", error)

    def _clear_now(self, is_urgent: bool) -> None:
        found = self.media.scan()
        rows = {row.number: row for row in self._store.outline()}
        self.media.remove_others({(row.camera, row.id) for row in rows.values()}, wire_now().timestamp() - ABANDONED_S)
        aged = [
            Aged(
                row.number,
                row.began_at,
                row.is_clock_sure,
                row.is_open,
                found.get((row.camera, row.id), Stored()).total_bytes,
                self._age_s_of(row.camera),
            )
            for row in rows.values()
        ]
        now = wire_now().timestamp() if self._clock_is_synced() else None
        going = too_much(aged, self._keep, now, self.media.free_bytes())
        if not going:
            return
        if is_urgent:  # a disk that takes no row gives none either: files first, and the next start clears what points at nothing
            for number in going:
                self.media.remove(rows[number].camera, rows[number].id)
        self._store.remove(going)
        for number in going:
            self.media.remove(rows[number].camera, rows[number].id)
        logger.info("%d events were removed to keep within age, budget and free space", len(going))

    def _drop(self, why: str) -> None:
        self.dropped += 1
        if self.dropped.bit_count() == 1:  # the 1st, 2nd, 4th, 8th …
            logger.warning("%d events of cameras are lost: %s", self.dropped, why)
