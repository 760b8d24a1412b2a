"""Events and data that wait for the broker, on disk, oldest first; what is too old or too much is dropped and counted.

NORMAL commits: a power cut may lose the last moments, a killed process nothing, and neither breaks the file.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent.link.store import open_store

SCHEMA = """
CREATE TABLE IF NOT EXISTS messages (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  class TEXT NOT NULL,
  topic TEXT NOT NULL,
  payload BLOB NOT NULL,
  boot TEXT NOT NULL,
  created_s REAL NOT NULL    -- clock of that boot
);
CREATE INDEX IF NOT EXISTS by_class ON messages(class, boot, created_s);
"""

OutboxClass = Literal["alarm", "event", "data"]


@dataclass(frozen=True, slots=True)
class Keep:
    """How long and how many of one class are kept; beyond either the oldest goes."""

    ttl_s: int
    count: int
    total_bytes: int


KEEPS: Mapping[OutboxClass, Keep] = {
    "alarm": Keep(7 * 86_400, 2_000, 16 << 20),
    "event": Keep(86_400, 5_000, 16 << 20),
    "data": Keep(3_600, 10_000, 32 << 20),
}


@dataclass(frozen=True, slots=True)
class Waiting:
    """One stored message. `expiry_s`: what is left of its time, for the broker."""

    id: int
    outbox_class: OutboxClass
    topic: str
    payload: bytes
    expiry_s: int


@dataclass(frozen=True, slots=True)
class OutboxLevel:
    count: int
    oldest_s: float
    dropped: Mapping[str, int]


class Outbox:
    """`with Outbox(file, boot) as outbox`. Synchronous under a lock: some 60 µs a call. Raises StoreError when the disk will not.

    Age counts on the clock of one boot; what an earlier boot left has an unknown age and only the bounds remove it.
    """

    def __init__(self, file: Path, boot: str, keeps: Mapping[OutboxClass, Keep] = KEEPS) -> None:
        self._file = file
        self._boot = boot
        self._keeps = keeps
        self._lock = threading.Lock()
        self._dropped: Counter[str] = Counter()
        self._load: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Outbox:
        self._connection = open_store(self._file, SCHEMA, "NORMAL")
        rows = self._connection.execute("SELECT class, count(*), total(length(payload)) FROM messages GROUP BY class")
        self._load = {name: (count, int(size)) for name, count, size in rows}
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._connection.close()

    def put(self, outbox_class: OutboxClass, topic: str, payload: bytes, now_s: float) -> None:
        keep = self._keeps[outbox_class]
        with self._lock:
            count, size = self._load.get(outbox_class, (0, 0))
            while count and (count >= keep.count or size + len(payload) > keep.total_bytes):
                count, size = self._drop_oldest(outbox_class)
            self._connection.execute(
                "INSERT INTO messages (class, topic, payload, boot, created_s) VALUES (?, ?, ?, ?, ?)",
                (outbox_class, topic, payload, self._boot, now_s),
            )
            self._load[outbox_class] = (count + 1, size + len(payload))

    def oldest(self, now_s: float, limit: int = 50) -> list[Waiting]:
        """The next to send, after what is too old was dropped."""
        with self._lock:
            self._drop_expired(now_s)
            rows = self._connection.execute(
                "SELECT id, class, topic, payload, boot, created_s FROM messages ORDER BY id LIMIT ?", (limit,)
            ).fetchall()
        return [
            Waiting(number, name, topic, payload, max(1, int(self._keeps[name].ttl_s - (now_s - created_s if boot == self._boot else 0.0))))
            for number, name, topic, payload, boot, created_s in rows
        ]

    def done(self, message: Waiting) -> None:
        """The broker has it, or will never take it."""
        with self._lock:
            self._remove(message.id, message.outbox_class, len(message.payload))

    def dropped(self, outbox_class: OutboxClass) -> None:
        """Counts one that was lost without being stored."""
        with self._lock:
            self._dropped[outbox_class] += 1

    def level(self, now_s: float) -> OutboxLevel:
        with self._lock:
            row = self._connection.execute("SELECT boot, created_s FROM messages ORDER BY id LIMIT 1").fetchone()
            oldest_s = 0.0 if row is None else (now_s - row[1] if row[0] == self._boot else now_s)
            return OutboxLevel(sum(count for count, _ in self._load.values()), max(0.0, oldest_s), dict(self._dropped))

    def _drop_expired(self, now_s: float) -> None:
        for name, keep in self._keeps.items():
            rows = self._connection.execute(
                "SELECT id, length(payload) FROM messages WHERE class = ? AND boot = ? AND created_s <= ?",
                (name, self._boot, now_s - keep.ttl_s),
            ).fetchall()
            for message_id, size in rows:
                self._remove(message_id, name, size)
                self._dropped[name] += 1

    def _drop_oldest(self, outbox_class: OutboxClass) -> tuple[int, int]:
        message_id, size = self._connection.execute(
            "SELECT id, length(payload) FROM messages WHERE class = ? ORDER BY id LIMIT 1", (outbox_class,)
        ).fetchone()
        self._remove(message_id, outbox_class, size)
        self._dropped[outbox_class] += 1
        return self._load[outbox_class]

    def _remove(self, message_id: int, outbox_class: str, size: int) -> None:
        if self._connection.execute("DELETE FROM messages WHERE id = ?", (message_id,)).rowcount:
            count, total = self._load[outbox_class]
            self._load[outbox_class] = (count - 1, total - size)
