"""The API keys of this node's clients, as digests, and what each may ask; read anew when their file changes.

One key a line: the SHA-256 of it in hex, then, where wanted, what it is called and its limits; `#` begins a comment:

    5e88…d8  name=kitchen requests_per_minute=60 tokens_per_minute=20000 concurrent=4
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

DIGEST = re.compile(r"^[0-9a-f]{64}$")
NAME = re.compile(r"^[\w.@-]{1,64}$")
COUNT = re.compile(r"^[1-9][0-9]{0,11}$")
LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent")
BYTES_MAX = 1 << 20
KEYS_ARE = "a line is one SHA-256 of a key in hex (printf %s KEY | sha256sum | cut -c1-64), then name=… and limits, if any"


class KeysError(Exception):
    """The file cannot be used; the message says which line and why, and holds no digest."""


@dataclass(frozen=True, slots=True)
class KeyRules:
    """What the holder of one key may ask. 0: as much as the node gives."""

    name: str = ""
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent: int = 0


Keys = Mapping[bytes, KeyRules]


def read_keys(file: Path) -> Keys:
    """SHA-256 of each key → its rules. Raises KeysError, also for a file without any key."""
    try:
        with file.open("rb") as stream:
            text = stream.read(BYTES_MAX).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}; {KEYS_ARE}") from error
    found: dict[bytes, KeyRules] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if not DIGEST.match(words[0].lower()):
            raise KeysError(f"line {number} of {file} does not begin with 64 hex digits; {KEYS_ARE}")
        found[bytes.fromhex(words[0])] = _rules(words[1:], f"line {number} of {file}")
    if not found:
        raise KeysError(f"{file} has no key, so nobody could ask this node; {KEYS_ARE}")
    return found


def _rules(words: list[str], where: str) -> KeyRules:
    name, limits = "", dict.fromkeys(LIMITS, 0)
    for word in words:
        field_, _, value = word.partition("=")
        if field_ == "name" and NAME.match(value):
            name = value
        elif field_ in limits and COUNT.match(value):
            limits[field_] = int(value)
        else:
            raise KeysError(f"{where}: {word[:80]!r} is none of name=WORD, {', '.join(f'{limit}=NUMBER' for limit in LIMITS)}")
    return KeyRules(name, **limits)


@dataclass
class KeysFile:
    """`keys()` is what the file holds now. One that cannot be used any more leaves the last keys in force, with one line in the log."""

    file: Path
    last: Keys
    _mark: tuple[int, int, int] | None = field(default=None, init=False)
    _has_told: bool = field(default=False, init=False)

    def keys(self) -> Keys:
        try:
            seen = self.file.stat()
            mark = (seen.st_mtime_ns, seen.st_size, seen.st_ino)
            if mark != self._mark:
                self._mark = mark
                self.last = read_keys(self.file)
                self._has_told = False
        except (OSError, KeysError) as error:
            if isinstance(error, OSError):
                self._mark = None
            if not self._has_told:
                logger.warning("http.keys_file: %s; the keys of before stay in force", error)
            self._has_told = True
        return self.last
