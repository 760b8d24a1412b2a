"""ULIDs: 48 bits of milliseconds, 80 bits of chance, 26 characters that sort by time (github.com/ulid/spec)."""

from __future__ import annotations

import re
import secrets
import threading
import time

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
ULID_PATTERN = r"^[0-7][0-9A-HJKMNP-TV-Z]{25}$"
_ULID = re.compile(ULID_PATTERN[:-1] + r"\Z")
_LIMIT = 1 << 128


def is_ulid(text: str) -> bool:
    return _ULID.match(text) is not None


def next_value(timestamp_ms: int, last: int) -> int:
    """A 128-bit value greater than `last`, also when the clock stood still or went back. Pure but for its chance."""
    fresh = ((timestamp_ms & (1 << 48) - 1) << 80) | secrets.randbits(80)
    if fresh >> 80 > last >> 80:
        return fresh
    return (last + 1) % _LIMIT


def encode(value: int) -> str:
    return "".join(_ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))


class _Source:
    """The last id given out, for ids of one process never repeat nor go back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def __call__(self) -> str:
        with self._lock:
            self._last = next_value(time.time_ns() // 1_000_000, self._last)
            return encode(self._last)


new_ulid = _Source()


def window_start(newest: str, window_s: int) -> str:
    """The smallest id that is at most `window_s` older than `newest`."""
    timestamp_ms = sum(_ALPHABET.index(letter) << 5 * place for place, letter in enumerate(reversed(newest[:10])))
    return encode(max(0, timestamp_ms - window_s * 1000) << 80)
