"""What is known of an unfinished download: it lies beside the file, so that any later process can go on.

The file may be longer than what is surely on the disk (a power cut leaves garbage at its end), so only `durable_bytes` count.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from models.durable import write_atomically
from models.record import RecordError, from_mapping, to_mapping


@dataclass(frozen=True)
class Partial:
    """`validator`: the server's name for this very version (RFC 9110 section 8.8); without one nothing can be resumed."""

    url: str
    validator: str = ""
    durable_bytes: int = 0
    total_bytes: int = 0

    @property
    def is_complete(self) -> bool:
        return 0 < self.total_bytes == self.durable_bytes


def read_partial(target: Path, url: str) -> Partial:
    """The state of the unfinished download of this URL, or one that starts at zero."""
    try:
        partial = from_mapping(Partial, json.loads(_state_path(target).read_bytes().decode()))
    except (OSError, ValueError, RecordError):
        return Partial(url)
    is_usable = partial.url == url and bool(partial.validator) and 0 <= partial.durable_bytes <= file_bytes(target)
    return partial if is_usable else Partial(url)


def write_partial(target: Path, partial: Partial) -> None:
    write_atomically(_state_path(target), json.dumps(to_mapping(partial)).encode())


def drop_partial(target: Path) -> None:
    """Remove an unfinished download and its state."""
    for path in (_state_path(target), target):
        path.unlink(missing_ok=True)


def file_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _state_path(target: Path) -> Path:
    return target.with_name(target.name + ".json")
