"""The events of all cameras in one SQLite file. Synchronous, for a thread; the write-ahead log keeps it whole in a crash."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.cameras.record import EndedBy, EventRecord
from agent.link.store import open_store

SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  camera TEXT NOT NULL,
  label TEXT NOT NULL,
  began_at REAL NOT NULL,
  is_clock_sure INTEGER NOT NULL,
  ended_at REAL,
  ended_by TEXT,
  has_snapshot INTEGER NOT NULL,
  has_clip INTEGER NOT NULL,
  details TEXT NOT NULL        -- JSON: what is read with an event, but not searched, except for zones
);
CREATE INDEX IF NOT EXISTS by_camera ON events(camera, number);
CREATE INDEX IF NOT EXISTS by_label ON events(label, number);
CREATE INDEX IF NOT EXISTS still_open ON events(camera) WHERE ended_at IS NULL;
"""
COLUMNS = "number, id, camera, label, began_at, is_clock_sure, ended_at, ended_by, has_snapshot, has_clip, details"
IN_ZONE = "EXISTS (SELECT 1 FROM json_each(details, '$.zones') WHERE value = :zone)"


@dataclass(frozen=True, slots=True)
class Filter:
    """None: any. `since` and `until` are seconds since 1970, of the beginning of an event."""

    camera: str | None = None
    label: str | None = None
    zone: str | None = None
    since: float | None = None
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """An event as far as retention is concerned."""

    number: int
    camera: str
    id: str
    began_at: float
    is_clock_sure: bool
    is_open: bool
    has_snapshot: bool
    has_clip: bool


class EventStore:
    """`with EventStore(file) as store`. Every method raises agent.link.store.StoreError when the disk does not take or give it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()

    def __enter__(self) -> EventStore:
        self._connection = open_store(self._file, SCHEMA, "NORMAL")
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._connection.close()

    def save(self, records: Iterable[EventRecord]) -> int:
        """Add or renew, all or none. What has ended is not changed any more, nor does an event change its camera. How many were taken."""
        with self._lock, self._transaction():
            return sum(self._save(record) for record in records)

    def _save(self, record: EventRecord) -> int:
        changed = self._connection.execute(
            "INSERT INTO events (id, camera, label, began_at, is_clock_sure, ended_at, ended_by, has_snapshot, has_clip, details)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET label = excluded.label, ended_at = excluded.ended_at,"
            " ended_by = excluded.ended_by, has_snapshot = MAX(has_snapshot, excluded.has_snapshot),"
            " has_clip = MAX(has_clip, excluded.has_clip), details = CASE WHEN excluded.has_snapshot THEN excluded.details"
            " ELSE json_set(excluded.details, '$.snapshot_box', json_extract(details, '$.snapshot_box')) END"
            " WHERE ended_at IS NULL AND camera = excluded.camera",
            (
                record.id, record.camera, record.label, record.began_at, record.is_clock_sure, record.ended_at, record.ended_by,
                record.has_snapshot, record.has_clip, json.dumps(_details(record)),
            ),
        )  # fmt: skip
        return changed.rowcount

    def end_open(self, ended_by: EndedBy, at: float) -> int:
        """End what is open with the mark of an end that nobody saw. How many there were."""
        with self._lock, self._transaction():
            return self._connection.execute("UPDATE events SET ended_at = ?, ended_by = ? WHERE ended_at IS NULL", (at, ended_by)).rowcount

    def event(self, identifier: str) -> EventRecord | None:
        with self._lock:
            row = self._connection.execute(f"SELECT {COLUMNS} FROM events WHERE id = ?", (identifier,)).fetchone()
        return None if row is None else _record(row)

    def page(self, wanted: Filter, before: int | None, limit: int) -> list[EventRecord]:
        """The newest first, with numbers below `before`."""
        values: dict[str, Any] = {"camera": wanted.camera, "label": wanted.label, "zone": wanted.zone, "since": wanted.since}
        values |= {"until": wanted.until, "before": before, "limit": limit}
        conditions = {
            "before": "number < :before", "camera": "camera = :camera", "label": "label = :label", "since": "began_at >= :since",
            "until": "began_at < :until", "zone": IN_ZONE,
        }  # fmt: skip
        where = " AND ".join(condition for name, condition in conditions.items() if values[name] is not None) or "1"
        with self._lock:
            rows = self._connection.execute(
                f"SELECT {COLUMNS} FROM events WHERE {where} ORDER BY number DESC LIMIT :limit", values
            ).fetchall()
        return [_record(row) for row in rows]

    def outline(self) -> list[Row]:
        """All events, oldest first."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT number, camera, id, began_at, is_clock_sure, ended_at IS NULL, has_snapshot, has_clip FROM events ORDER BY number"
            ).fetchall()
        return [Row(number, camera, each, began_at, *map(bool, flags)) for number, camera, each, began_at, *flags in rows]

    def remove(self, numbers: Sequence[int]) -> None:
        with self._lock, self._transaction():
            self._connection.executemany("DELETE FROM events WHERE number = ?", [(number,) for number in numbers])

    def forget_files(self, snapshots: Sequence[str], clips: Sequence[str]) -> None:
        """These events have no such file any more."""
        with self._lock, self._transaction():
            self._connection.executemany("UPDATE events SET has_snapshot = 0 WHERE id = ?", [(each,) for each in snapshots])
            self._connection.executemany("UPDATE events SET has_clip = 0 WHERE id = ?", [(each,) for each in clips])

    def _transaction(self) -> _Transaction:
        return _Transaction(self._connection)


class _Transaction:
    """BEGIN … COMMIT, or ROLLBACK where something failed: the connection is in autocommit mode."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            try:
                self._connection.execute("COMMIT")
            except sqlite3.Error:
                self._roll_back()
                raise
        else:
            self._roll_back()

    def _roll_back(self) -> None:
        if self._connection.in_transaction:  # a full disk rolls back by itself
            self._connection.execute("ROLLBACK")


def _details(record: EventRecord) -> dict[str, Any]:
    names = ("score", "box", "snapshot_box", "picture", "zones", "loitering", "crossed", "seen_for_s")
    return {**{name: getattr(record, name) for name in names}, "dwell_s": record.dwell_s or {}}


def _record(row: Sequence[Any]) -> EventRecord:
    number, identifier, camera, label, began_at, is_clock_sure, ended_at, ended_by, has_snapshot, has_clip, details = row
    told = json.loads(details)
    return EventRecord(
        id=identifier,
        camera=camera,
        label=label,
        began_at=began_at,
        score=told["score"],
        box=tuple(told["box"]),
        snapshot_box=tuple(told["snapshot_box"]),
        picture=(told["picture"][0], told["picture"][1]),
        zones=tuple(told["zones"]),
        dwell_s=told["dwell_s"],
        loitering=tuple(told["loitering"]),
        crossed=tuple((line, direction) for line, direction in told["crossed"]),
        ended_at=ended_at,
        ended_by=ended_by,
        seen_for_s=told["seen_for_s"],
        has_snapshot=bool(has_snapshot),
        has_clip=bool(has_clip),
        is_clock_sure=bool(is_clock_sure),
        number=number,
    )
