"""What must survive a crash: commands and their results, epoch and lease, counters. Every commit is on disk when it returns.

Synchronous, one call at a time under a lock; a commit costs some milliseconds, so the event loop calls it in a thread.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from agent.link.store import open_store
from agent.mode import Autonomy
from agent.protocol.lease import LeaseState, without_lease
from agent.protocol.messages import Command, Result
from agent.protocol.ulid import window_start
from agent.protocol.wire import FINAL_STATUSES, decode, encode

SCHEMA = """
CREATE TABLE IF NOT EXISTS commands (
  id TEXT PRIMARY KEY,
  command BLOB,              -- NULL once final: only what is open is ever run again
  boot TEXT NOT NULL,
  received_s REAL NOT NULL,  -- clock of that boot
  age_s REAL NOT NULL,       -- how old it was when received
  is_final INTEGER NOT NULL,
  seq INTEGER NOT NULL,
  sent_seq INTEGER NOT NULL,
  result BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS unsent ON commands(seq) WHERE sent_seq < seq;
CREATE INDEX IF NOT EXISTS open_commands ON commands(id) WHERE is_final = 0;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

KEPT_COMMANDS = 10_000
KEPT_DAYS = 7
KEPT_RESULT_BYTES = 32 << 20
PRUNE_EVERY = 256


@dataclass(frozen=True, slots=True)
class Entry:
    """An open command as found at start. `elapsed_s` since it was sent is None after a reboot, for no clock knows it."""

    command: Command
    last: Result
    elapsed_s: float | None


class Journal:
    """`with Journal(file, boot) as journal`. Methods raise StoreError when the disk does not take the write.

    `boot` names one boot of the kernel; `self.boot` joins it with this store's identity, so a wiped store is a new boot.
    """

    def __init__(self, file: Path, kernel_boot: str) -> None:
        self._file = file
        self._kernel_boot = kernel_boot
        self._lock = threading.Lock()
        self._inserts = 0
        self.boot = ""

    def __enter__(self) -> Journal:
        self._connection = open_store(self._file, SCHEMA, "FULL")
        store = self._fact("store") or uuid.uuid4().hex
        self._set_fact("store", store)
        self.boot = str(uuid.uuid5(uuid.UUID(store), self._kernel_boot))
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._connection.close()

    # Commands

    def last_result(self, command_id: str) -> Result | None:
        """The latest step of a command seen before (R5)."""
        with self._lock:
            row = self._connection.execute("SELECT result FROM commands WHERE id = ?", (command_id,)).fetchone()
        return decode(Result, row[0]) if row else None

    def receive(self, command: Command, first: Result, now_s: float, age_s: float, lease: LeaseState | None = None) -> None:
        """A new command and its first step, which may be final; with it, in the same commit, the lease it moved (L2)."""
        is_final = first.status in FINAL_STATUSES
        with self._transaction():
            self._connection.execute(
                "INSERT INTO commands VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?)",
                (command.id, None if is_final else encode(command), self.boot, now_s, age_s, is_final, first.seq, encode(first)),
            )
            if lease is not None:
                self._put("lease", json.dumps({"boot": self.boot, "lease": asdict(lease)}))
            self._inserts += 1
            if self._inserts % PRUNE_EVERY == 1:
                self._prune()

    def step(self, result: Result, survives_power_cut: bool = True) -> bool:
        """The next step of an open command. False, and nothing changed, if a final status stands already (R4).

        A killed process never loses a step; without `survives_power_cut` a power cut may.
        """
        is_final = result.status in FINAL_STATUSES
        with self._transaction(survives_power_cut):
            cursor = self._connection.execute(
                "UPDATE commands SET result = ?, seq = ?, is_final = ?, command = CASE WHEN ? THEN NULL ELSE command END"
                " WHERE id = ? AND is_final = 0 AND seq < ?",
                (encode(result), result.seq, is_final, is_final, result.id, result.seq),
            )
            return cursor.rowcount == 1

    def sent(self, result: Result) -> None:
        """The broker has this step."""
        with self._transaction(survives_power_cut=False):
            self._connection.execute("UPDATE commands SET sent_seq = ? WHERE id = ? AND sent_seq < ?", (result.seq, result.id, result.seq))

    def unsent(self, limit: int = 64) -> list[Result]:
        """Latest steps that the broker may not have, oldest command first."""
        with self._lock:
            rows = self._connection.execute("SELECT result FROM commands WHERE sent_seq < seq ORDER BY rowid LIMIT ?", (limit,)).fetchall()
        return [decode(Result, row[0]) for row in rows]

    def open_entries(self, now_s: float) -> list[Entry]:
        with self._lock:
            rows = self._connection.execute(
                "SELECT command, result, boot, received_s, age_s FROM commands WHERE is_final = 0 ORDER BY rowid"
            ).fetchall()
        return [
            Entry(decode(Command, command), decode(Result, result), now_s - received_s + age_s if boot == self.boot else None)
            for command, result, boot, received_s, age_s in rows
        ]

    def recent_ids(self, limit: int = 20) -> tuple[str, ...]:
        with self._lock:
            rows = self._connection.execute("SELECT id FROM commands ORDER BY rowid DESC LIMIT ?", (limit,)).fetchall()
        return tuple(row[0] for row in rows)

    def open_ids(self, limit: int = 64) -> tuple[str, ...]:
        with self._lock:
            rows = self._connection.execute("SELECT id FROM commands WHERE is_final = 0 ORDER BY rowid LIMIT ?", (limit,)).fetchall()
        return tuple(row[0] for row in rows)

    # Lease and autonomy

    def load_lease(self) -> LeaseState:
        """As stored; after a reboot without the lease, but with the epoch (L5)."""
        stored = self._fact("lease")
        if stored is None:
            return LeaseState()
        document = json.loads(stored)
        lease = LeaseState(**document["lease"])
        return lease if document["boot"] == self.boot else without_lease(lease)

    def save_lease(self, lease: LeaseState) -> None:
        self._set_fact("lease", json.dumps({"boot": self.boot, "lease": asdict(lease)}))

    def load_autonomy(self) -> Autonomy | None:
        stored = self._fact("autonomy")
        return Autonomy(**json.loads(stored)) if stored else None

    def save_autonomy(self, autonomy: Autonomy | None) -> None:
        self._set_fact("autonomy", json.dumps(asdict(autonomy)) if autonomy else "")

    # Counters and small facts

    def next_session(self) -> int:
        """R2: +1 for each CONNECT, on disk before the CONNECT is sent."""
        return self._add("session", 1)

    def reserve(self, count: int) -> int:
        """First of `count` sequence numbers that nobody ever had: one commit for many messages (R9)."""
        return self._add("sequence", count) - count + 1

    def meta_hash(self) -> str | None:
        return self._fact("meta_hash")

    def save_meta_hash(self, value: str) -> None:
        self._set_fact("meta_hash", value)

    def _add(self, name: str, count: int) -> int:
        with self._transaction():
            value = int(self._get(name) or 0) + count
            self._put(name, str(value))
            return value

    def _fact(self, name: str) -> str | None:
        with self._lock:
            return self._get(name)

    def _set_fact(self, name: str, value: str) -> None:
        with self._transaction():
            self._put(name, value)

    def _get(self, name: str) -> str | None:
        row = self._connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def _put(self, name: str, value: str) -> None:
        self._connection.execute("INSERT INTO facts VALUES (?, ?) ON CONFLICT(name) DO UPDATE SET value = excluded.value", (name, value))

    def _prune(self) -> None:
        # By the time inside the ids, which is the coordinator's clock on all of them: the node's own may have jumped.
        newest = self._connection.execute("SELECT max(id) FROM commands").fetchone()[0]
        execute = self._connection.execute
        execute("DELETE FROM commands WHERE is_final = 1 AND sent_seq >= seq AND id < ?", (window_start(newest, KEPT_DAYS * 86_400),))
        execute(
            "DELETE FROM commands WHERE is_final = 1 AND rowid IN (SELECT rowid FROM (SELECT rowid,"
            " row_number() OVER (ORDER BY rowid DESC) AS place, sum(length(result)) OVER (ORDER BY rowid DESC) AS bytes"
            " FROM commands) WHERE place > ? OR bytes > ?)",
            (KEPT_COMMANDS, KEPT_RESULT_BYTES),
        )

    @contextmanager
    def _transaction(self, survives_power_cut: bool = True) -> Iterator[None]:
        with self._lock:
            self._connection.execute(f"PRAGMA synchronous={'FULL' if survives_power_cut else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


def replayed(result: Result) -> Result:
    return result.model_copy(update={"replayed": True})
