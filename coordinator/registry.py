"""What the coordinator knows, in SQLite. The broker's retained topics are a cache; this is the record.

One class with the queries of the service, so that a fleet of thousands can have the same class over PostgreSQL. Rows take a newer `seq`
only (R9); an epoch is raised in the same transaction that records the order (L1).
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from agent.protocol.messages import Command, Desired, Event, Heartbeat, Meta, Presence, Result, State
from agent.protocol.operations import OPS
from agent.protocol.wire import FINAL_STATUSES

logger = logging.getLogger(__name__)

# Each step is run once, in this order; the database remembers how many it has had.
MIGRATIONS = (
    """
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
    """,
    """
    ALTER TABLE nodes ADD COLUMN is_silent INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX commands_of_node ON commands (node, id);
    """,
    """
    CREATE TABLE desired (node TEXT PRIMARY KEY, document TEXT NOT NULL);
    """,
)
EVENTS_KEPT = 10_000
COMMANDS_KEPT = 50_000
NO_NUMBER = (1 << 63) - 1  # higher than any event's
EXPIRED = "expired"  # closed by the coordinator because nobody answered; what the node says later still counts

Report = Presence | Meta | State | Heartbeat
Column = Literal["presence", "meta", "state", "heartbeat"]
KINDS: dict[Column, type[Report]] = {"presence": Presence, "meta": Meta, "state": State, "heartbeat": Heartbeat}


@dataclass(frozen=True, slots=True)
class NodeRow:
    """All that is recorded of one node; None where it has not said so yet. `is_silent`: lost without a word (R1)."""

    node: str
    epoch: int = 0
    is_drained: bool = False
    is_silent: bool = False
    presence: Presence | None = None
    meta: Meta | None = None
    state: State | None = None
    heartbeat: Heartbeat | None = None


@dataclass(frozen=True, slots=True)
class CommandRow:
    """`status` is the node's last word, `issued` before its first, or `expired`."""

    command: Command
    issued_s: float
    status: str
    result: Result | None
    is_final: bool


class Registry:
    """Single-writer access to the database; every method is short and runs on the caller's thread. Raises sqlite3.Error.

    Node rows are kept in memory too: decisions read all of them, several times a second.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Passwords of cameras are in desired documents. What SQLite puts beside the file gets its mode.
        file.touch(mode=0o600)
        for part in (file, file.with_name(file.name + "-wal"), file.with_name(file.name + "-shm")):
            with suppress(FileNotFoundError):
                part.chmod(0o600)
        self._database = sqlite3.connect(file, isolation_level=None, timeout=5.0)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._migrate()
        columns = "node, epoch, is_drained, is_silent, presence, meta, state, heartbeat"
        self._rows = {row[0]: _node_row(row) for row in self._database.execute(f"SELECT {columns} FROM nodes ORDER BY node")}
        self._revisions = {node: document.rev for node in self.wanting() if (document := self.desired(node)) is not None}

    def close(self) -> None:
        self._database.close()

    def check(self) -> None:
        """Whether the record takes a write at all. Raises sqlite3.Error."""
        with self._transaction():
            self._database.execute("INSERT OR REPLACE INTO facts VALUES ('checked', '')")

    def next_term(self, above: int = 0) -> int:
        """Higher at each start of a coordinator on this record, and than any term seen elsewhere."""
        with self._transaction():
            row = self._database.execute("SELECT value FROM facts WHERE name = 'term'").fetchone()
            term = max(int(row[0]) if row else 0, above) + 1
            self._database.execute("INSERT OR REPLACE INTO facts VALUES ('term', ?)", (str(term),))
        return term

    # Nodes

    def node(self, node: str) -> NodeRow | None:
        return self._rows.get(node)

    def nodes(self) -> list[NodeRow]:
        return list(self._rows.values())

    def store(self, column: Column, report: Report) -> bool:
        """Record a node's report unless a newer one is there. Returns whether it was taken.

        The epoch only grows: a record that was restored from a backup catches up with what the node says (L3).
        """
        row = self._rows.get(report.node, NodeRow(report.node))
        old = getattr(row, column)
        if isinstance(report, (State, Heartbeat)) and old is not None and old.boot == report.boot and old.seq >= report.seq:
            return False
        epoch = row.epoch if isinstance(report, Meta) else max(row.epoch, report.epoch)
        text = report.model_dump_json(by_alias=True, exclude_none=True)
        with self._transaction(survives_power_cut=False):  # the broker and the node have it too
            self._database.execute(
                f"INSERT INTO nodes (node, epoch, {column}) VALUES (?, ?, ?)"
                f" ON CONFLICT(node) DO UPDATE SET epoch = excluded.epoch, {column} = excluded.{column}",
                (report.node, epoch, text),
            )
        self._rows[report.node] = replace(row, epoch=epoch, **{column: report})  # type: ignore[arg-type]  # a column takes its kind
        return True

    def set_silent(self, node: str, is_silent: bool) -> None:
        self._update(node, is_silent=is_silent)

    def raise_epoch(self, node: str, at_least: int) -> None:
        if (row := self._rows.get(node)) is not None and row.epoch < at_least:
            self._update(node, epoch=at_least)

    def forget(self, node: str) -> bool:
        """Drop a node and close its open orders. Whether it was known."""
        if node not in self._rows:
            return False
        with self._transaction():
            self._database.execute("DELETE FROM nodes WHERE node = ?", (node,))
            self._database.execute("DELETE FROM desired WHERE node = ?", (node,))
            self._database.execute("UPDATE commands SET status = ?, is_final = 1 WHERE node = ? AND is_final = 0", (EXPIRED, node))
        del self._rows[node]
        self._revisions.pop(node, None)
        return True

    def _update(self, node: str, **values: int) -> None:
        if (row := self._rows.get(node)) is None:
            return
        with self._transaction():
            self._set(node, values)
        self._rows[node] = replace(row, **values)  # type: ignore[arg-type]  # names and types are the caller's, all in this class

    def _set(self, node: str, values: dict[str, int]) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        self._database.execute(f"UPDATE nodes SET {names} WHERE node = ?", (*map(int, values.values()), node))

    # Desired documents

    def desired(self, node: str) -> Desired | None:
        """What the operator wants on a node; None where he leaves that to the node."""
        row = self._database.execute("SELECT document FROM desired WHERE node = ?", (node,)).fetchone()
        try:
            return Desired.model_validate_json(row[0]) if row else None
        except ValidationError as error:  # written by another version: the operator will say it again
            logger.warning("the desired state of %s on record is unreadable and ignored: %s", node, error.errors()[0]["msg"])
            return None

    def wanted_revision(self, node: str) -> int | None:
        """Of the desired document; from memory, for lists of the whole fleet."""
        return self._revisions.get(node)

    def wanting(self) -> list[str]:
        """Nodes with a desired document."""
        return [node for (node,) in self._database.execute("SELECT node FROM desired ORDER BY node")]

    def want(self, node: str, document: Desired | None) -> None:
        with self._transaction():
            if document is None:
                self._database.execute("DELETE FROM desired WHERE node = ?", (node,))
            else:
                self._database.execute("INSERT OR REPLACE INTO desired VALUES (?, ?)", (node, document.model_dump_json()))
        if document is None:
            self._revisions.pop(node, None)
        else:
            self._revisions[node] = document.rev

    # Commands

    def issue(self, command: Command, issued_s: float) -> CommandRow:
        """Record an order before it is sent (L1). Raises KeyError for an unknown node.

        Orders that move the lease get a new epoch, a renewal the current one. An operator's `drain` lasts until the next other order.
        """
        row = after = self._rows[command.node]
        if OPS[command.op].moves_lease and command.op != "renew":
            after = replace(row, epoch=row.epoch + 1, is_drained=command.op == "drain")
        if OPS[command.op].moves_lease:
            command = command.model_copy(update={"epoch": after.epoch})
        with self._transaction():
            if after is not row:
                self._set(row.node, {"epoch": after.epoch, "is_drained": after.is_drained})
            self._database.execute(
                "INSERT INTO commands (id, node, op, command, issued_s) VALUES (?, ?, ?, ?, ?)",
                (command.id, command.node, command.op, command.model_dump_json(exclude_none=True), issued_s),
            )
            self._database.execute(
                "DELETE FROM commands WHERE is_final = 1 AND rowid <= (SELECT max(rowid) FROM commands) - ?", (COMMANDS_KEPT,)
            )
        self._rows[row.node] = after
        return CommandRow(command, issued_s, "issued", None, is_final=False)

    def store_result(self, result: Result) -> bool:
        """Record a step of an order to that node. A final status is immutable (R4); returns whether this step was news."""
        row = self.command(result.id)
        if row is None or row.command.node != result.node or (row.is_final and row.status != EXPIRED):
            return False
        if row.result is not None and result.seq <= row.result.seq:
            return False
        with self._transaction():
            self._database.execute(
                "UPDATE commands SET status = ?, result = ?, is_final = ? WHERE id = ?",
                (result.status, result.model_dump_json(exclude_none=True), int(result.status in FINAL_STATUSES), result.id),
            )
        return True

    def command(self, identifier: str) -> CommandRow | None:
        row = self._database.execute(f"SELECT {_COMMAND} FROM commands WHERE id = ?", (identifier,)).fetchone()
        return _command_row(row) if row else None

    def open_commands(self, node: str | None = None) -> list[CommandRow]:
        """Orders without a final result, oldest first."""
        where, values = ("AND node = ?", (node,)) if node else ("", ())
        rows = self._database.execute(f"SELECT {_COMMAND} FROM commands WHERE is_final = 0 {where} ORDER BY id", values)
        return [_command_row(row) for row in rows]

    def expire(self, identifier: str) -> None:
        with self._transaction():
            self._database.execute("UPDATE commands SET status = ?, is_final = 1 WHERE id = ? AND is_final = 0", (EXPIRED, identifier))

    def commands(self, node: str, limit: int = 50) -> list[CommandRow]:
        """The newest first."""
        rows = self._database.execute(f"SELECT {_COMMAND} FROM commands WHERE node = ? ORDER BY id DESC LIMIT ?", (node, limit))
        return [_command_row(row) for row in rows]

    # Events

    def add_event(self, event: Event) -> bool:
        """Keep the newest; an event that was delivered twice counts once. Returns whether it was news."""
        text = event.model_dump_json(by_alias=True, exclude_none=True)
        with self._transaction(survives_power_cut=False):
            done = self._database.execute("INSERT OR IGNORE INTO events (id, node, event) VALUES (?, ?, ?)", (event.id, event.node, text))
            self._database.execute("DELETE FROM events WHERE number <= (SELECT max(number) FROM events) - ?", (EVENTS_KEPT,))
        return done.rowcount > 0

    def events(self, after: int = 0, limit: int = 100, before: int = NO_NUMBER) -> list[tuple[int, dict[str, Any]]]:
        """Numbered events after the given number, or the newest `limit` for 0; all of them before `before`. The oldest first."""
        query = "SELECT number, event FROM events WHERE number > ? AND number < ? ORDER BY number"
        query = f"{query} LIMIT ?" if after else f"SELECT * FROM ({query} DESC LIMIT ?) ORDER BY number"
        return [(number, json.loads(text)) for number, text in self._database.execute(query, (after, before, limit))]

    def last_event(self) -> int:
        """The number of the newest, 0 before the first."""
        number: int | None = self._database.execute("SELECT max(number) FROM events").fetchone()[0]
        return number or 0

    def _migrate(self) -> None:
        done = self._database.execute("PRAGMA user_version").fetchone()[0]
        if done > len(MIGRATIONS):
            raise sqlite3.DatabaseError(f"the database has schema {done}, this coordinator knows {len(MIGRATIONS)}; use a newer one")
        for number, step in enumerate(MIGRATIONS[done:], done + 1):
            self._database.executescript(f"BEGIN IMMEDIATE; {step}; PRAGMA user_version = {number}; COMMIT")

    @contextmanager
    def _transaction(self, survives_power_cut: bool = True) -> Iterator[None]:
        self._database.execute(f"PRAGMA synchronous={'FULL' if survives_power_cut else 'NORMAL'}")
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise


_COMMAND = "command, issued_s, status, result, is_final"


def _node_row(row: tuple[Any, ...]) -> NodeRow:
    node, epoch, is_drained, is_silent, *texts = row
    reports = {column: _report(kind, node, text) for (column, kind), text in zip(KINDS.items(), texts, strict=True)}
    return NodeRow(node, epoch, bool(is_drained), bool(is_silent), **reports)  # type: ignore[arg-type]  # the kinds are in column order


def _report(kind: type[Report], node: str, text: str | None) -> Report | None:
    try:
        return kind.model_validate_json(text) if text else None
    except ValidationError as error:  # written by another version: the node will say it again
        logger.warning("the stored %s of %s is unreadable and ignored: %s", kind.__name__, node, error.errors()[0]["msg"])
        return None


def _command_row(row: tuple[Any, ...]) -> CommandRow:
    command, issued_s, status, result, is_final = row
    return CommandRow(
        Command.model_validate_json(command), issued_s, status, Result.model_validate_json(result) if result else None, bool(is_final)
    )
