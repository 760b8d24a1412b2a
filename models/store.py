"""Artefacts and engines on disk.

    <root>/blobs/sha256/<hex>               fetched artefacts, read-only, named by their content
    <root>/sources.json                     source → digest and size: what every fetch yielded, and the digests recorded at first use
    <root>/engines/<model>/<key digest>/    what the converters built, with `engine.json`
    <root>/checked.json                     which files of engines were read and found right (models/checksums.py)
    <root>/provider/<place>/<content>/      engines that a provider of ONNX Runtime made of our graphs, and its timings
    <root>/timing/, <root>/calibration/     what builds have measured: kernels of TensorRT, ranges of int8
    <root>/partial/                         unfinished downloads, to be resumed
    <root>/temporary/                       work in progress; of dead processes removed by `open_store`
    <root>/locks/

Everything gets its final name by one rename after fsync, so whatever has its final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterable, List, Mapping, Optional

from models.checksums import whole_engine
from models.durable import (
    NoSpace,
    StoreError,
    exclusive,
    publish,
    sha256_of,
    shared,
    sweep,
    sync,
    temporary_folder,
    write_atomically,
)
from models.engine_record import RECORD_NAME, EngineFile, EngineKey, EngineRecord, StoredEngine, read_engine, record_bytes
from models.manifest import NAME, ModelFile
from models.record import RecordError, from_mapping, to_mapping

SPACE_RESERVE_BYTES = 64 << 20
PROVIDER_FOLDER, TIMING_FOLDER, CALIBRATION_FOLDER = "provider", "timing", "calibration"
SHORT_WAIT_S = 30.0


def default_root(environment: Mapping[str, str]) -> Path:
    """HOTSPARE_STATE, else the STATE_DIRECTORY that systemd gives a service, else the user's data folder."""
    named = environment.get("HOTSPARE_STATE") or environment.get("STATE_DIRECTORY", "").split(":")[0]
    if named:
        return Path(named).absolute()
    data = environment.get("XDG_DATA_HOME") or str(Path(environment.get("HOME") or "~").expanduser() / ".local" / "share")
    return Path(data) / "hotspare"


def default_store(environment: Mapping[str, str]) -> Path:
    """HOTSPARE__MODELS__STORE, as the node reads its configuration, else its state folder: commands must find what the node has."""
    named = environment.get("HOTSPARE__MODELS__STORE")
    return Path(named).absolute() if named else default_root(environment)


def open_store(root: Optional[Path] = None) -> Store:
    """The store of this device, its folders made and the leftovers of dead processes removed. Raises StoreError."""
    root = default_store(os.environ) if root is None else root.absolute()
    try:
        for folder in ("blobs/sha256", "engines", "partial", "temporary", "locks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        sweep(root / "temporary")
    except OSError as error:
        raise StoreError(f"cannot use {root} as the store: {error.strerror}; set HOTSPARE_STATE to a folder this user may write") from error
    return Store(root)


def free_bytes(path: Path) -> int:
    """Room that an ordinary user may still fill in the file system of `path`."""
    facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize


class Store:
    """One store on one file system. Holds no state of its own: any number of processes may use the same root."""

    def __init__(self, root: Path, free_bytes: Callable[[Path], int] = free_bytes) -> None:
        self.root = root
        self._free_bytes = free_bytes

    # artefacts

    def blob_path(self, sha256: str) -> Path:
        return self.root / "blobs" / "sha256" / sha256

    def find(self, file: ModelFile) -> Optional[Path]:
        """The blob of a model's file if it has been fetched, by the manifest's digest or else the one recorded at first use."""
        sha256 = self.expected_sha256(file)
        if not sha256:
            return None
        path = self.blob_path(sha256)
        return path if path.is_file() else None

    def expected_sha256(self, file: ModelFile) -> str:
        """The digest this file must have; empty when nothing is known of it yet."""
        return file.sha256 or self.recorded_sha256(file.source)

    def recorded_sha256(self, source: str) -> str:
        entry = self.sources().get(source)
        return "" if entry is None else entry.sha256

    def sources(self) -> Dict[str, EngineFile]:
        """Every source that was ever fetched, with what it yielded. Raises StoreError when the record is damaged."""
        path = self.root / "sources.json"
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            return {str(source): from_mapping(EngineFile, entry) for source, entry in json.loads(text.decode()).items()}
        except (ValueError, AttributeError, RecordError) as error:
            raise StoreError(f"{path} is damaged ({error}); restore it, or remove it to record digests anew") from error

    def adopt(self, temporary: Path, source: str, sha256: str) -> Path:
        """Publish a fetched file (in this file system, its digest checked by the caller) and record what its source yielded."""
        size_bytes = temporary.stat().st_size
        target = self.blob_path(sha256)
        temporary.chmod(0o444)
        publish(temporary, target)
        with self.lock("sources", SHORT_WAIT_S):
            entries = dict(self.sources())
            entries[source] = EngineFile(sha256, size_bytes)
            self._write_sources(entries)
        return target

    def forget_sources(self, sources: Iterable[str]) -> None:
        """Drop the recorded digests: the next fetch records what it gets."""
        with self.lock("sources", SHORT_WAIT_S):
            dropped = set(sources)
            self._write_sources({source: entry for source, entry in self.sources().items() if source not in dropped})

    def _write_sources(self, entries: Mapping[str, EngineFile]) -> None:
        text = json.dumps({source: to_mapping(entry) for source, entry in sorted(entries.items())}, indent=1)
        write_atomically(self.root / "sources.json", text.encode())

    def partial_folder(self, source: str) -> Path:
        """Where the unfinished download of a source lies, with its state."""
        return self.root / "partial" / hashlib.sha256(source.encode()).hexdigest()

    # engines

    def engine_folder(self, key: EngineKey) -> Path:
        if not NAME.match(key.model):
            raise StoreError(f"an engine of {key.model!r} cannot be stored: a model's name must match {NAME.pattern}")
        return self.root / "engines" / key.model / key.digest()

    def find_engine(self, key: EngineKey) -> Optional[StoredEngine]:
        """The engine of exactly this key, marked as used now; None when there is none or it is not what was published."""
        engine = whole_engine(self.engine_folder(key))
        if engine is not None:
            mark_used(engine.folder)
        return engine

    def engines(self, model: Optional[str] = None) -> List[StoredEngine]:
        """All whole engines, of one model or of all."""
        folders = sorted((self.root / "engines").glob("*/*" if model is None else f"{model}/*"))
        return [engine for engine in map(read_engine, folders) if engine is not None]

    def publish_engine(self, key: EngineKey, folder: Path, verdict: Mapping[str, Any], versions: Mapping[str, str]) -> StoredEngine:
        """Move a finished build (a folder from `temporary`) to its place, with its record. The folder is gone afterwards.

        An engine of the same key that is already there and whole wins; a torn one is replaced. Raises StoreError for an empty folder or
        anything in it that is not a plain file.
        """
        files: Dict[str, EngineFile] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise StoreError(f"{path} is not a plain file; an engine may hold only those")
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = EngineFile(sha256_of(path), path.stat().st_size)
                path.chmod(0o444)
            sync(path)
        if not files or RECORD_NAME in files:
            raise StoreError(f"{folder} is no engine: it holds {'its own ' + RECORD_NAME if files else 'no files'}")
        created_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = EngineRecord(key, files, dict(verdict), dict(versions), created_at)
        write_atomically(folder / RECORD_NAME, record_bytes(record))
        target = self.engine_folder(key)
        with self.lock(f"publish-{key.digest()}", SHORT_WAIT_S):
            present = whole_engine(target)
            if present is None:
                self.discard(target)
                folder.chmod(0o755)
                publish(folder, target)
                present = StoredEngine(target, record)
        return present

    def discard(self, path: Path) -> None:
        """Remove a file or folder so that a crash half-way leaves nothing under its old name."""
        with self.temporary() as folder:
            if os.path.lexists(path):
                os.rename(path, folder / "discarded")  # noqa: PTH104  (a plain rename within the file system)

    # work in progress

    def temporary(self) -> ContextManager[Path]:
        """A folder for a build or a download, in the store's own file system; gone at the end."""
        return temporary_folder(self.root / "temporary")

    def lock(self, name: str, timeout_s: float) -> ContextManager[None]:
        """Hold `name` alone across processes, e.g. to build an engine once. Raises StoreBusy after the deadline."""
        return exclusive(self._lock_path(name), timeout_s, name)

    def using(self, key: EngineKey) -> ContextManager[None]:
        """Keep an engine from being evicted while a process has it open."""
        return self.in_use(key.digest())

    def in_use(self, name: str) -> ContextManager[None]:
        """The same for an engine or an artefact by the name of its folder or file. Waits while somebody is removing it."""
        return shared(self._lock_path(f"using-{name}"))

    def _lock_path(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.lock"

    def free_bytes(self) -> int:
        return self._free_bytes(self.root)

    def require_space(self, needed_bytes: int, purpose: str) -> None:
        """Raises NoSpace unless the file system has room for `needed_bytes` and a reserve."""
        free = self._free_bytes(self.root)
        if free < needed_bytes + SPACE_RESERVE_BYTES:
            raise no_space(self.root, purpose, needed_bytes, free)


def no_space(root: Path, purpose: str, needed_bytes: int, free: int) -> NoSpace:
    return NoSpace(
        f"{purpose} needs {megabytes(needed_bytes)} and a reserve of {megabytes(SPACE_RESERVE_BYTES)}, "
        f"but {root} has {megabytes(free)} free; make room (`hotspare models rm NAME`) or set HOTSPARE_STATE to a larger disk"
    )


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def mark_used(path: Path) -> None:
    """Note the time of use for eviction. A read-only store is used all the same."""
    try:
        os.utime(path)
    except OSError:
        return
