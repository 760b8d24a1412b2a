"""The record of how well this node's clients were served, by the hour, for a month; and the two promises as numbers.

One row an hour in SQLite, written each few seconds: a kill loses those, a power cut no more than the last commit. Hours are those of the
wall clock; when it jumps, answers are added to the hour that it shows then, and no row is lost.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread

from agent.gateway.levels import AVAILABILITY_TARGET, SAVED_TARGET, Hour, told, total
from agent.http.outcome import Outcome
from agent.link.store import open_store

logger = logging.getLogger(__name__)

SCHEMA = "CREATE TABLE IF NOT EXISTS hours (hour INTEGER PRIMARY KEY, figures TEXT NOT NULL);"  # hour: of those since 1970
HOUR_S = 3600
KEPT_HOURS = 31 * 24
TOLD_HOURS = 48
SAVE_S = 5.0
DISK_S = 5.0


class SlaRecord:
    """`told` takes an outcome at once; `run` reads what was kept and writes what is new. `clock`: seconds since 1970.

    `primary` says how the primary is seen; None: this node is no gateway.
    """

    def __init__(self, file: Path, clock: Callable[[], float], primary: Callable[[], Mapping[str, Any] | None] = lambda: None) -> None:
        self._file = file
        self._clock = clock
        self._primary = primary
        self._hours: dict[int, Hour] = {}
        self._new: set[int] = set()
        self._connection: sqlite3.Connection | None = None
        self._is_failing = self._is_loaded = False

    def told(self, outcome: Outcome) -> None:
        number = int(self._clock() // HOUR_S)
        self._hours.setdefault(number, Hour()).add(outcome)
        self._new.add(number)

    def report(self) -> Mapping[str, Any]:
        now = int(self._clock() // HOUR_S)
        hours = {number: hour for number, hour in self._hours.items() if now - KEPT_HOURS < number <= now}
        days: dict[int, list[Hour]] = {}
        for number, hour in hours.items():
            days.setdefault(number // 24, []).append(hour)
        return {
            "targets": {"availability": AVAILABILITY_TARGET, "saved_share": SAVED_TARGET},
            "primary": self._primary(),
            "last_24_hours": told(total(hour for number, hour in hours.items() if number > now - 24)),
            "last_31_days": told(total(hours.values())),
            "hours": [{"from": _time(number), **told(hours[number])} for number in sorted(hours) if number > now - TOLD_HOURS],
            "days": [{"from": _time(24 * day), **told(total(days[day]))} for day in sorted(days)],
        }

    async def run(self) -> None:
        await self._load()
        try:
            while True:
                await anyio.sleep(SAVE_S)
                await self._save()
        finally:
            with anyio.CancelScope(shield=True):
                await self._save()
                await self._tried(self._close)

    async def _load(self) -> None:
        """Before anything is written: a row that could not be read yet must not be replaced."""
        kept: dict[int, Hour] | None = await self._tried(self._read)
        if kept is None:
            return
        for number, hour in kept.items():
            self._hours[number] = total([hour, self._hours[number]]) if number in self._hours else hour
        self._is_loaded = True

    async def _save(self) -> None:
        if not self._is_loaded:
            await self._load()
        if not self._is_loaded:
            return
        numbers, self._new = self._new, set()
        for number in sorted(self._hours)[: max(0, len(self._hours) - 2 * KEPT_HOURS)]:
            del self._hours[number]
        if not numbers:
            return
        rows = [(number, json.dumps(self._hours[number].packed())) for number in sorted(numbers) if number in self._hours]
        if await self._tried(lambda: self._write(rows)) is None:
            self._new |= numbers

    async def _tried(self, work: Callable[[], Any]) -> Any:
        """What `work` gives in a thread; None where the disk would not."""
        try:
            with anyio.fail_after(DISK_S):
                found = await to_thread.run_sync(work, abandon_on_cancel=True)
        except (sqlite3.Error, OSError, TimeoutError) as error:
            if not self._is_failing:
                logger.warning("the record of answers is not written to %s: %s", self._file, error or "the disk takes too long")
            self._is_failing = True
            return None
        self._is_failing = False
        return found

    # ── in a thread ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self) -> dict[int, Hour]:
        hours = {}
        for number, figures in self._open().execute("SELECT hour, figures FROM hours").fetchall():
            try:
                hours[int(number)] = Hour.unpacked(json.loads(figures))
            except ValueError as error:
                logger.warning("an hour of the record of answers cannot be read and is left out: %s", error)
        return hours

    def _write(self, rows: list[tuple[int, str]]) -> bool:
        connection = self._open()
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR REPLACE INTO hours (hour, figures) VALUES (?, ?)", rows)
            keep = "SELECT hour FROM hours ORDER BY hour DESC LIMIT ?"
            connection.execute(f"DELETE FROM hours WHERE hour NOT IN ({keep})", (2 * KEPT_HOURS,))
        return True

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = open_store(self._file, SCHEMA, "NORMAL")
        return self._connection

    def _close(self) -> bool:
        if self._connection is not None:
            self._connection.close()
        return True


def _time(hour: int) -> str:
    return datetime.fromtimestamp(hour * HOUR_S, timezone.utc).isoformat().replace("+00:00", "Z")
