"""Kept answers in one SQLite file of this node: bounded in number and bytes, what was used longest ago goes first.

What was used lately is in memory too, and given from there at once: a thread that reads a file for a busy event loop waits for the
interpreter lock at each of its steps, 5 ms a time. Uses are written down with the next answer, not one by one.
A file that is broken is set aside and begun anew; a disk that is full or slow costs hits, never an answer.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import anyio
from anyio import CapacityLimiter, to_thread

from agent.gateway.recent import Found, Recent
from agent.link.store import open_store

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  key TEXT PRIMARY KEY,
  number INTEGER NOT NULL,     -- grows with each use
  until_s REAL NOT NULL,       -- seconds since 1970
  size INTEGER NOT NULL,
  answer BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS by_use ON answers(number);
"""
GET_S = 0.5  # far less than an answer takes, more than a thread waits for its turn on a busy device
PUT_S = 2.0
RECENT_BYTES = 8 << 20


class SqliteAnswers:
    """`get` and `put` never raise: what cannot be read is a miss, what cannot be written is not kept."""

    def __init__(self, file: Path, max_bytes: int, max_entries: int, clock: Callable[[], float]) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._clock = clock
        self._recent = Recent(min(RECENT_BYTES, max_bytes))
        self._limiter = CapacityLimiter(1)
        self._lock = threading.Lock()  # taken by a thread that nobody waits for any more
        self._connection: sqlite3.Connection | None = None
        self._number = self._bytes = self._entries = 0
        self._has_told = False

    async def get(self, key: str) -> bytes | None:
        if (answer := self._recent.get(key, self._clock())) is not None:
            return answer
        found = await self._do(lambda: self._get(key), GET_S)
        if found is None:
            return None
        self._recent.put(key, found)
        return found.answer

    async def put(self, key: str, answer: bytes, ttl_s: float) -> None:
        if len(answer) > self._max_bytes // 8:
            return
        self._recent.drop([key])
        used, until_s = self._recent.taken(), self._clock() + ttl_s
        gone = await self._do(lambda: self._put(key, answer, until_s, used), PUT_S)
        if gone is not None:
            self._recent.drop(gone)
            self._recent.put(key, Found(until_s, answer))

    async def run(self) -> None:
        """Waits to be cancelled, then closes the file."""
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(PUT_S):
                used = self._recent.taken()
                await to_thread.run_sync(self._safely, lambda: self._end(used), limiter=self._limiter, abandon_on_cancel=True)

    async def _do(self, work: Callable[[], Result], deadline_s: float) -> Result | None:
        with anyio.move_on_after(deadline_s):
            return await to_thread.run_sync(self._safely, work, limiter=self._limiter, abandon_on_cancel=True)
        return None

    # ── in a thread ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _safely(self, work: Callable[[], Result]) -> Result | None:
        if not self._lock.acquire(blocking=False):  # the disk hangs: no second thread hangs with it
            return None
        try:
            return self._tried(work)
        finally:
            self._lock.release()

    def _tried(self, work: Callable[[], Result]) -> Result | None:
        try:
            if self._connection is None:
                self._open()
            found = work()
            self._has_told = False
        except (sqlite3.Error, OSError) as error:
            self._close()  # the next one opens it anew, and sets it aside if it is broken
            is_broken = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
            if is_broken:
                self._set_aside()
            if not self._has_told:
                logger.warning("answers are not kept: %s: %s%s", self._file, error, "; begun anew" if is_broken else "")
            self._has_told = True
            return None
        return found

    def _open(self) -> None:
        self._connection = open_store(self._file, SCHEMA, "NORMAL")
        row = self._connection.execute("SELECT count(*), total(size), coalesce(max(number), 0) FROM answers").fetchone()
        self._entries, self._bytes, self._number = int(row[0]), int(row[1]), int(row[2])

    def _end(self, used: list[str]) -> None:
        self._note(used)
        self._close()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _set_aside(self) -> None:
        """Broken in the middle, where opening does not look."""
        try:
            self._file.replace(self._file.with_name(self._file.name + ".broken"))
            for tail in ("-wal", "-shm"):
                self._file.with_name(self._file.name + tail).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s is broken and cannot be set aside: %s", self._file, error)

    @property
    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            raise sqlite3.ProgrammingError("the file is closed")
        return self._connection

    def _get(self, key: str) -> Found | None:
        row = self._database.execute("SELECT until_s, answer FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        if row[0] <= self._clock():
            self._remove(key)
            return None
        return Found(float(row[0]), bytes(row[1]))

    def _put(self, key: str, answer: bytes, until_s: float, used: list[str]) -> list[str]:
        """Which others had to go."""
        self._note(used)
        self._remove(key)
        gone = []
        while self._entries and (self._entries >= self._max_entries or self._bytes + len(answer) > self._max_bytes):
            oldest = self._database.execute("SELECT key FROM answers ORDER BY number LIMIT 1").fetchone()
            if oldest is None:
                self._entries = self._bytes = 0
                break
            self._remove(oldest[0])
            gone.append(str(oldest[0]))
        self._number += 1
        row = (key, self._number, until_s, len(answer), answer)
        self._database.execute("INSERT INTO answers (key, number, until_s, size, answer) VALUES (?, ?, ?, ?, ?)", row)
        self._entries, self._bytes = self._entries + 1, self._bytes + len(answer)
        return gone

    def _note(self, used: list[str]) -> None:
        """Write down the order in which kept answers were used."""
        if not used:
            return
        rows = [(self._number + place, key) for place, key in enumerate(used, 1)]
        self._number += len(used)
        self._database.execute("BEGIN")
        self._database.executemany("UPDATE answers SET number = ? WHERE key = ?", rows)
        self._database.execute("COMMIT")

    def _remove(self, key: str) -> None:
        row = self._database.execute("SELECT size FROM answers WHERE key = ?", (key,)).fetchone()
        if row is not None:
            self._database.execute("DELETE FROM answers WHERE key = ?", (key,))
            self._entries, self._bytes = self._entries - 1, self._bytes - int(row[0])
