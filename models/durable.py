"""Writes that a crash or a power cut leaves either whole or absent, and locks that die with their holder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Optional, Union

READ_BYTES = 1 << 20
POLL_S = 0.1


class StoreError(RuntimeError):
    """The store cannot do what was asked; the message says what to do."""


class StoreBusy(StoreError):
    """Another process held a lock past the deadline."""


class NoSpace(StoreError):
    """The file system has less room than the work needs."""


def sha256_of(path: Path, progress: Optional[Callable[[int], None]] = None) -> str:
    """sha256 of a file as hex. `progress` is told the number of bytes read so far."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as stream:
        for chunk in iter(lambda: stream.read(READ_BYTES), b""):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a folder by its path: for a folder, the names in it survive a power cut after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no fsync of a folder
            raise
    finally:
        os.close(descriptor)


def publish(temporary: Path, target: Path) -> None:
    """Give a finished file or folder of the same file system its final name, atomically and durably."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sync(temporary)
    os.rename(temporary, target)  # noqa: PTH104  (a folder over an empty folder, which Path.replace promises no more than this)
    sync(target.parent)


def write_atomically(path: Path, data: Union[bytes, memoryview], mode: int = 0o644) -> None:
    """Replace the content of a file: a reader sees the old or the new one, never a part. `mode`: who may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=str(path.parent), prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        temporary.chmod(mode)
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def exclusive(path: Path, timeout_s: float, what: str) -> Iterator[None]:
    """Hold the lock file `path` alone. Raises StoreBusy when another process still holds it after `timeout_s`.

    flock(2): the lock ends with the process that holds it, however that dies. Lock files are never deleted, for a second process could
    then lock a new file of the same name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    with path.open("ab") as stream:
        while not try_lock(stream.fileno(), fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise StoreBusy(
                    f"another process is busy with {what}; after {timeout_s:.0f} s it still was. Wait for it or end it, then try again"
                )
            time.sleep(POLL_S)
        yield


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold the lock file `path` together with other users of the same thing; `exclusive` waits for all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream:
        fcntl.flock(stream.fileno(), fcntl.LOCK_SH)
        yield


def try_lock(descriptor: int, kind: int) -> bool:
    """Take a lock of `kind` if it is free right now."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """An own folder below `parent`, removed at the end, and by `sweep` when this process dies before."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(tempfile.mkdtemp(dir=str(parent)))
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if folder.exists():  # else `sweep` took it between its making and its locking
            break
        os.close(descriptor)
    try:
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(str(folder), ignore_errors=True)


def sweep(parent: Path) -> int:
    """Remove the temporary folders of dead processes (nobody holds their lock). Returns how many there were."""
    removed = 0
    for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            if try_lock(descriptor, fcntl.LOCK_EX):
                shutil.rmtree(str(folder), ignore_errors=True)
                removed += 1
        finally:
            os.close(descriptor)
    return removed
