"""Engine files against the digests of their record: what was not published never reaches a runtime.

Reading gigabytes at each start of a worker would take longer than opening them, so each content is read once: `checked.json` in the store
remembers inode, size and times of the files that were right. Whoever writes to a file changes those. What a disk forgets by itself does
not: `hotspare models verify` reads everything again.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from models.durable import StoreError, sha256_of, write_atomically
from models.engine_record import RECORD_NAME, StoredEngine, read_engine

MEMORY_NAME = "checked.json"
MEMORY_BYTES_MAX = 16 << 20

log = logging.getLogger(__name__)

# Engine folder below `engines/` → file → [sha256, inode, size, mtime_ns, ctime_ns]
Memory = Dict[str, Dict[str, List[Any]]]


def damage_of(folder: Path) -> Optional[str]:
    """Why the engine of a folder must not be opened, as the end of a sentence about it; None when it is what was published.

    A folder without a record is a build that is looked at before it is published: there is nothing to hold it to.
    """
    if not (folder / RECORD_NAME).exists():
        return None
    stored = read_engine(folder)
    if stored is None:
        return f"is damaged: {RECORD_NAME} and the files beside it disagree"
    try:
        return _damage(stored)
    except OSError as error:
        return f"cannot be read: {error}"


def whole_engine(folder: Path) -> Optional[StoredEngine]:
    """The engine of a folder when it has a record and all of it is what was published."""
    stored = read_engine(folder)
    return stored if stored is not None and damage_of(folder) is None else None


def _damage(stored: StoredEngine) -> Optional[str]:
    folder, memory = stored.folder, _memory_path(stored.folder)
    place = f"{folder.parent.name}/{folder.name}"
    known = {} if memory is None else _read(memory).get(place, {})
    seen: Dict[str, List[Any]] = {}
    for name, file in stored.record.files.items():
        facts = (folder / name).stat()
        seen[name] = [file.sha256, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
        if known.get(name) != seen[name] and sha256_of(folder / name) != file.sha256:
            return f"is damaged: {name} is not the file that was published (its sha256 differs)"
    if memory is not None and seen != known:
        _remember(memory, place, seen)
    return None


def _memory_path(folder: Path) -> Optional[Path]:
    """Only the store remembers; an engine elsewhere is read each time."""
    engines = folder.absolute().parent.parent
    return engines.parent / MEMORY_NAME if engines.name == "engines" else None


def _read(path: Path) -> Memory:
    """Empty when there is none: then everything is read again."""
    try:
        with path.open("rb") as stream:
            found = json.loads(stream.read(MEMORY_BYTES_MAX).decode())
    except (OSError, ValueError):
        return {}
    return {str(place): dict(files) for place, files in found.items() if isinstance(files, Mapping)} if isinstance(found, dict) else {}


def _remember(path: Path, place: str, seen: Dict[str, List[Any]]) -> None:
    """Two workers may write at once: then the one that is forgotten reads its engine once more."""
    engines = path.parent / "engines"
    kept = {other: files for other, files in _read(path).items() if (engines / other / RECORD_NAME).exists()}
    try:
        write_atomically(path, json.dumps({**kept, place: seen}, separators=(",", ":")).encode())
    except (OSError, StoreError) as error:
        log.warning("%s cannot be written: %s; engines are read again at each start", path, error)
