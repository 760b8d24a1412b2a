"""`file:` and `shipped:` — files that are on this machine already. They are copied, for the original may change or go."""

from __future__ import annotations

import stat
from pathlib import Path

from models.durable import READ_BYTES
from models.engine_record import is_inside
from models.sources.errors import NotThere, SourceError
from models.sources.work import Work

PACKAGE = Path(__file__).parent.parent


def shipped(location: str) -> Path:
    """A file of the installed package `models`. Raises SourceError for a path that leaves it."""
    if not is_inside(location):
        raise SourceError(f"shipped:{location} leaves the package; name a path inside `models`")
    return PACKAGE / location


def copy(path: Path, work: Work) -> Path:
    """Copy a regular file into the work's folder. Raises NotThere, SourceError, NoSpace."""
    if not path.is_absolute():
        raise SourceError(f"{work.file.source}: {path} is not absolute")
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotThere(f"{path} does not exist") from error
    if not stat.S_ISREG(facts.st_mode):
        raise SourceError(f"{path} is not a regular file")
    work.require_space(facts.st_size)
    target, done = work.folder / "copy", 0
    with path.open("rb") as source, target.open("wb") as stream:
        for chunk in iter(lambda: source.read(READ_BYTES), b""):
            stream.write(chunk)
            done += len(chunk)
            work.progress(done, facts.st_size)
    return target
