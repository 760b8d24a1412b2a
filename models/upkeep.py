"""Care of a store: what is in it, whether it is still whole, and what may go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Collection, Iterable, Iterator, List, Literal, Optional

from models.durable import StoreBusy, sha256_of
from models.engine_record import RECORD_NAME, read_engine
from models.manifest import Manifest
from models.store import Store


@dataclass(frozen=True)
class Usage:
    artefact_bytes: int
    engine_bytes: int
    partial_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.artefact_bytes + self.engine_bytes + self.partial_bytes


@dataclass(frozen=True)
class Damage:
    """`torn`: not what its name or record says; `foreign`: nothing the store has put there."""

    path: Path
    kind: Literal["torn", "foreign"]
    detail: str


@dataclass(frozen=True)
class Candidate:
    """Something that could be evicted. `used_at`: its modification time, refreshed at each use."""

    path: Path
    size_bytes: int
    used_at: float
    lock: str


def usage(store: Store) -> Usage:
    return Usage(*(_tree_bytes(store.root / folder) for folder in ("blobs", "engines", "partial")))


def verify(store: Store, manifest: Optional[Manifest] = None, progress: Optional[Callable[[Path], None]] = None) -> List[Damage]:
    """Read everything again (or what belongs to one model) and name whatever is torn or foreign. Removes nothing."""
    tell = progress or (lambda path: None)
    damages: List[Damage] = []
    for path in _blobs(store, manifest):
        tell(path)
        damages.extend(_check_blob(path))
    for folder in sorted((store.root / "engines").glob("*/*" if manifest is None else f"{manifest.name}/*")):
        tell(folder)
        damages.extend(_check_engine(folder))
    return damages


def _blobs(store: Store, manifest: Optional[Manifest]) -> Iterator[Path]:
    if manifest is None:
        yield from sorted(store.blob_path("").iterdir())
        return
    for file in manifest.files.values():
        path = store.find(file)
        if path is not None:
            yield path


def _check_blob(path: Path) -> Iterator[Damage]:
    if not path.is_file() or path.is_symlink() or len(path.name) != 64:
        yield Damage(path, "foreign", "not an artefact of the store")
        return
    sha256 = sha256_of(path)
    if sha256 != path.name:
        yield Damage(path, "torn", f"its content has sha256 {sha256}; remove it and pull the model again")


def _check_engine(folder: Path) -> Iterator[Damage]:
    engine = read_engine(folder)
    if engine is None:
        yield Damage(folder, "torn", f"{RECORD_NAME} or a file it names is missing, truncated or of another key; convert the model again")
        return
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == RECORD_NAME or path.is_dir():
            continue
        if name not in engine.record.files or path.is_symlink():
            yield Damage(path, "foreign", f"not named in {RECORD_NAME}")
        elif sha256_of(path) != engine.record.files[name].sha256:
            yield Damage(path, "torn", "its content is not what was built; remove the engine and convert the model again")


def remove(store: Store, manifest: Manifest, others: Iterable[Manifest] = (), forget: bool = False) -> int:
    """Remove a model's engines, unfinished downloads, and those artefacts that no manifest of `others` names. Returns the freed bytes.

    Digests recorded at first use stay, so that a later pull is held to them, unless `forget`. Raises StoreBusy, with nothing removed,
    when a process has an engine of the model open.
    """
    for engine in store.engines(manifest.name):
        with store.lock(f"using-{engine.folder.name}", 0.0):
            pass
    kept = {store.expected_sha256(file) for other in others if other.name != manifest.name for file in other.files.values()}
    paths = [store.root / "engines" / manifest.name]
    for file in manifest.files.values():
        paths.append(store.partial_folder(file.source))
        blob = store.find(file)
        if blob is not None and blob.name not in kept:
            paths.append(blob)
    freed = sum(_tree_bytes(path) for path in paths)
    for path in paths:
        store.discard(path)
    if forget:
        store.forget_sources(file.source for file in manifest.files.values())
    return freed


def evict(store: Store, budget_bytes: int, needed_bytes: int = 0, keep: Collection[str] = ()) -> List[Path]:
    """Remove what was not used for longest until `needed_bytes` more fit into `budget_bytes`. Returns what went.

    `keep` holds model names (their engines stay) and sha256s (those artefacts stay). Engines that a process has open stay too, so the
    budget can remain exceeded: compare `usage` afterwards where that matters.
    """
    excess = usage(store).total_bytes + needed_bytes - budget_bytes
    gone: List[Path] = []
    for candidate in sorted(_candidates(store, keep), key=lambda candidate: candidate.used_at):
        if excess <= 0:
            break
        try:
            with store.lock(candidate.lock, 0.0):
                store.discard(candidate.path)
        except StoreBusy:
            continue
        excess -= candidate.size_bytes
        gone.append(candidate.path)
    return gone


def _candidates(store: Store, keep: Collection[str]) -> Iterator[Candidate]:
    for folder in (store.root / "engines").glob("*/*"):
        if folder.parent.name not in keep:
            yield Candidate(folder, _tree_bytes(folder), folder.stat().st_mtime, f"using-{folder.name}")
    for path in store.blob_path("").iterdir():
        if path.name not in keep:
            yield Candidate(path, _tree_bytes(path), path.stat().st_mtime, f"using-{path.name}")


def _tree_bytes(path: Path) -> int:
    """Size of a file or of all files below a folder; 0 where there is nothing."""
    if path.is_file():
        return path.stat().st_size
    return sum(item.lstat().st_size for item in path.rglob("*") if not item.is_dir())
