"""How the link opens its SQLite files: one writer, write-ahead log, and a broken file set aside instead of a dead node."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

FOR_US_ALONE = 0o600  # orders hold passwords of cameras
StoreError = sqlite3.Error  # disk full, file gone, file broken: the caller reports and goes on


def open_store(file: Path, schema: str, synchronous: Literal["FULL", "NORMAL"]) -> sqlite3.Connection:
    """Autocommit connection for use under one lock. A file that is no database is renamed to `….broken` and begun anew."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _open(file, schema, synchronous)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise  # locked, full or not allowed: the file itself may be fine
        aside = file.with_name(file.name + ".broken")
        logger.error("%s is broken (%s); set aside as %s, starting with an empty one", file, error, aside)  # noqa: TRY400 - the trace adds nothing
        file.replace(aside)
        for tail in ("-wal", "-shm"):
            file.with_name(file.name + tail).unlink(missing_ok=True)
        return _open(file, schema, synchronous)


def _open(file: Path, schema: str, synchronous: str) -> sqlite3.Connection:
    try:
        file.touch(mode=FOR_US_ALONE)
        file.chmod(FOR_US_ALONE)  # SQLite gives its log the same
    except OSError as error:
        raise sqlite3.OperationalError(f"{file}: {error}") from error
    connection = sqlite3.connect(file, timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        connection.execute("PRAGMA wal_autocheckpoint=256")
        connection.executescript(schema)
    except BaseException:
        connection.close()
        raise
    return connection
