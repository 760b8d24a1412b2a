"""What the coordinator knows, in SQLite. The broker's retained topics are a cache; this is the record.

One class with the queries of the service, so that a fleet of thousands can have the same class over PostgreSQL. Rows take a newer `seq`
only (R9); an epoch is raised in the same transaction that records the order (L1).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent.protocol.messages import Command, Event, Heartbeat, Meta, Presence, Result, State
from agent.protocol.wire import FINAL_STATUSES

SCHEMA = """
CREATE TABLE IF NOT EXISTS nodes (
  node TEXT PRIMARY KEY, epoch INTEGER NOT NULL DEFAULT 0, is_drained INTEGER NOT NULL DEFAULT 0,
  presence TEXT, meta TEXT, state TEXT, heartbeat TEXT
);
CREATE TABLE IF NOT EXISTS commands (
  id TEXT PRIMARY KEY, node TEXT NOT NULL, op TEXT NOT NULL, command TEXT NOT NULL, issued_s REAL NOT NULL,
  status TEXT NOT NULL DEFAULT 'issued', result TEXT, is_final INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS open_commands ON commands (node) WHERE is_final = 0;
CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, node TEXT NOT NULL, event TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
EVENTS_KEPT = 10_000
COMMANDS_KEPT = 50_000

Report = Presence | Meta | State | Heartbeat
Column = Literal["presence", "meta", "state", "heartbeat"]
KINDS: dict[Column, type[Report]] = {"presence": Presence, "meta": Meta, "state": State, "heartbeat": Heartbeat}


@dataclass(frozen=True, slots=True)
class NodeRow:
    """All that is recorded of one node; None where it has not said so yet."""

    node: str
    epoch: int
    is_drained: bool
    presence: Presence | None
    meta: Meta | None
    state: State | None
    heartbeat: Heartbeat | None


@dataclass(frozen=True, slots=True)
class CommandRow:
    command: Command
    status: str
    result: Result | None
    is_final: bool


class Registry:
    """Single-writer access to the database; every method is short and runs on the caller's thread."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(file, isolation_level=None, timeout=10.0)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.executescript(SCHEMA)

    def close(self) -> None:
        self._database.close()

    def next_term(self) -> int:
        """One higher at each start of a coordinator on this record."""
        with self._transaction():
            row = self._database.execute("SELECT value FROM facts WHERE name = 'term'").fetchone()
            term = int(row[0]) + 1 if row else 1
            self._database.execute("INSERT OR REPLACE INTO facts VALUES ('term', ?)", (str(term),))
        return term

    def store(self, column: Column, report: Report) -> bool:
        """Record a node's report unless a newer one is there. Returns whether it was taken."""
        with self._transaction():
            self._database.execute("INSERT OR IGNORE INTO nodes (node) VALUES (?)", (report.node,))
            row = self.node(report.node)
            old = getattr(row, column) if row else None
            if isinstance(report, (State, Heartbeat)) and old is not None and old.boot == report.boot and old.seq >= report.seq:
                return False
            text = report.model_dump_json(by_alias=True, exclude_none=True)
            self._database.execute(f"UPDATE nodes SET {column} = ? WHERE node = ?", (text, report.node))
            if isinstance(report, (Presence, State)):  # L3: a record restored from a backup catches up
                self._database.execute("UPDATE nodes SET epoch = max(epoch, ?) WHERE node = ?", (report.epoch, report.node))
        return True

    def node(self, node: str) -> NodeRow | None:
        row = self._database.execute(
            "SELECT node, epoch, is_drained, presence, meta, state, heartbeat FROM nodes WHERE node = ?", (node,)
        ).fetchone()
        return _node_row(row) if row else None

    def nodes(self) -> list[NodeRow]:
        rows = self._database.execute("SELECT node, epoch, is_drained, presence, meta, state, heartbeat FROM nodes ORDER BY node")
        return [_node_row(row) for row in rows]

    def forget(self, node: str) -> bool:
        return self._database.execute("DELETE FROM nodes WHERE node = ?", (node,)).rowcount > 0

    def set_drained(self, node: str, is_drained: bool) -> None:
        self._database.execute("UPDATE nodes SET is_drained = ? WHERE node = ?", (int(is_drained), node))

    def raise_epoch(self, node: str, at_least: int) -> None:
        self._database.execute("UPDATE nodes SET epoch = max(epoch, ?) WHERE node = ?", (at_least, node))

    def issue(self, command: Command, issued_s: float, raises_epoch: bool) -> Command:
        """Record an order before it is sent (L1). With `raises_epoch` it carries a new epoch; a renewal repeats the current one."""
        with self._transaction():
            if command.op in ("activate", "standby", "drain", "renew"):
                if raises_epoch:
                    self._database.execute("UPDATE nodes SET epoch = epoch + 1 WHERE node = ?", (command.node,))
                epoch = self._database.execute("SELECT epoch FROM nodes WHERE node = ?", (command.node,)).fetchone()
                command = command.model_copy(update={"epoch": epoch[0] if epoch else 0})
            self._database.execute(
                "INSERT INTO commands (id, node, op, command, issued_s) VALUES (?, ?, ?, ?, ?)",
                (command.id, command.node, command.op, command.model_dump_json(exclude_none=True), issued_s),
            )
            self._database.execute(
                "DELETE FROM commands WHERE is_final = 1 AND rowid <= (SELECT max(rowid) FROM commands) - ?", (COMMANDS_KEPT,)
            )
        return command

    def store_result(self, result: Result) -> bool:
        """Record a step. A final status is immutable (R4); returns whether this step was news."""
        with self._transaction():
            row = self.command(result.id)
            if row is None or row.is_final or (row.result is not None and result.seq <= row.result.seq):
                return False
            self._database.execute(
                "UPDATE commands SET status = ?, result = ?, is_final = ? WHERE id = ?",
                (result.status, result.model_dump_json(exclude_none=True), int(result.status in FINAL_STATUSES), result.id),
            )
        return True

    def command(self, identifier: str) -> CommandRow | None:
        row = self._database.execute("SELECT command, status, result, is_final FROM commands WHERE id = ?", (identifier,)).fetchone()
        return _command_row(row) if row else None

    def open_commands(self, node: str) -> list[tuple[Command, float]]:
        """Orders without a final result and when they were issued, oldest first."""
        rows = self._database.execute("SELECT command, issued_s FROM commands WHERE node = ? AND is_final = 0 ORDER BY id", (node,))
        return [(Command.model_validate_json(text), issued_s) for text, issued_s in rows]

    def expire(self, identifier: str) -> None:
        self._database.execute("UPDATE commands SET status = 'expired', is_final = 1 WHERE id = ? AND is_final = 0", (identifier,))

    def commands(self, node: str | None = None, limit: int = 50) -> list[CommandRow]:
        where, values = ("WHERE node = ?", (node, limit)) if node else ("", (limit,))
        rows = self._database.execute(f"SELECT command, status, result, is_final FROM commands {where} ORDER BY id DESC LIMIT ?", values)
        return [_command_row(row) for row in rows]

    def add_event(self, event: Event) -> bool:
        """Keep the newest; an event that was delivered twice counts once."""
        with self._transaction():
            text = event.model_dump_json(by_alias=True, exclude_none=True)
            is_new = self._database.execute("INSERT OR IGNORE INTO events (id, node, event) VALUES (?, ?, ?)", (event.id, event.node, text))
            self._database.execute("DELETE FROM events WHERE number <= (SELECT max(number) FROM events) - ?", (EVENTS_KEPT,))
        return is_new.rowcount > 0

    def events(self, after: int = 0, limit: int = 100) -> list[tuple[int, dict[str, Any]]]:
        """Numbered events after the given number, or the newest `limit` for 0."""
        query = (
            "SELECT number, event FROM events WHERE number > ? ORDER BY number LIMIT ?"
            if after
            else "SELECT * FROM (SELECT number, event FROM events WHERE number > ? ORDER BY number DESC LIMIT ?) ORDER BY number"
        )
        return [(number, json.loads(text)) for number, text in self._database.execute(query, (after, limit))]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


def _node_row(row: tuple[Any, ...]) -> NodeRow:
    node, epoch, is_drained, *texts = row
    presence, meta, state, heartbeat = (
        kind.model_validate_json(text) if text else None for kind, text in zip(KINDS.values(), texts, strict=True)
    )
    return NodeRow(node, epoch, bool(is_drained), presence, meta, state, heartbeat)  # type: ignore[arg-type]  # the kinds are in column order


def _command_row(row: tuple[Any, ...]) -> CommandRow:
    command, status, result, is_final = row
    return CommandRow(Command.model_validate_json(command), status, Result.model_validate_json(result) if result else None, bool(is_final))
