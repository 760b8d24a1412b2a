"""The key for the primary, read anew when its file changes, so that a new one counts without a restart."""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


class KeyFile:
    """`key()` is what the file holds now, "" without a file. One that cannot be read any more leaves the last key in use."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._key = ""
        self._mark: tuple[int, int] | None = None
        self._is_readable = True

    def key(self) -> str:
        if self._file is None:
            return ""
        try:
            seen = self._file.stat()
            if (seen.st_mtime_ns, seen.st_size) != self._mark:
                self._key = self._file.read_text().strip()
                self._mark = (seen.st_mtime_ns, seen.st_size)
            self._is_readable = True
        except (OSError, UnicodeDecodeError) as error:
            if self._is_readable:
                logger.warning("the key for the primary cannot be read from %s: %s; the last one stays in use", self._file, error)
            self._is_readable = False
        return self._key
