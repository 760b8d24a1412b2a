"""Care of a store: what is in it, whether it is still whole, and what may go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Collection, Dict, Iterable, Iterator, List, Literal, Optional, Set

from models.durable import StoreBusy, sha256_of
from models.engine_record import RECORD_NAME, StoredEngine, content_digest, file_sizes, read_engine, read_record
from models.manifest import Manifest
from models.store import CALIBRATION_FOLDER, PROVIDER_FOLDER, SPACE_RESERVE_BYTES, TIMING_FOLDER, Store

MEASURED = (PROVIDER_FOLDER, TIMING_FOLDER, CALIBRATION_FOLDER)


@dataclass(frozen=True)
class Usage:
    """`measured_bytes`: what can be measured or built again: engines of providers, timings of kernels, ranges of int8."""

    artefact_bytes: int
    engine_bytes: int
    partial_bytes: int
    measured_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.artefact_bytes + self.engine_bytes + self.partial_bytes + self.measured_bytes


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
    blobs, engines, partial = (_tree_bytes(store.root / folder) for folder in ("blobs", "engines", "partial"))
    return Usage(blobs, engines, partial, sum(_tree_bytes(store.root / folder) for folder in MEASURED))


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
    record = read_record(folder)
    if record is None:
        yield Damage(folder, "torn", f"its {RECORD_NAME} is missing, damaged or of another key; convert the model again")
        return
    found = file_sizes(folder)
    for name in sorted({*found, *record.files}):
        path, expected, size_bytes = folder / name, record.files.get(name), found.get(name)
        if expected is None or size_bytes == -1:
            yield Damage(path, "foreign", f"not what {RECORD_NAME} names; remove the engine and convert the model again")
        elif size_bytes != expected.size_bytes or sha256_of(path) != expected.sha256:
            yield Damage(path, "torn", "its content is not what was built; remove the engine and convert the model again")


def repair(store: Store, damages: Iterable[Damage]) -> List[Path]:
    """Remove what is damaged, an engine as a whole; all of it can be fetched or built again. Returns what stayed, for it is in use."""
    engines, blobs = store.root / "engines", store.blob_path("0").parent
    owners: Dict[Path, None] = {}
    for damage in damages:
        inside = damage.path.relative_to(engines).parts[:2] if engines in damage.path.parents else ()
        owners[engines.joinpath(*inside) if inside else blobs / damage.path.relative_to(blobs).parts[0]] = None
    return [path for path in owners if not _discard_unused(store, path)]


def repair_engine(store: Store, folder: Path) -> bool:
    """Read an engine again and remove it if it is damaged and not in use; whether it went."""
    return any(True for _ in _check_engine(folder)) and _discard_unused(store, folder)


def discard_torn_engines(store: Store, model: str) -> List[Path]:
    """Remove the engines of a model that by their sizes are no whole ones, and in no use. Returns what went."""
    torn = [folder for folder in sorted((store.root / "engines").glob(f"{model}/*")) if read_engine(folder) is None]
    return [folder for folder in torn if _discard_unused(store, folder)]


def discard_torn_files(store: Store, manifest: Manifest) -> List[Path]:
    """Read the artefacts of a model again and remove the damaged ones. Returns what went."""
    torn = [path for path in _blobs(store, manifest) if any(True for _ in _check_blob(path))]
    return [path for path in torn if _discard_unused(store, path)]


def _discard_unused(store: Store, path: Path) -> bool:
    try:
        with store.lock(f"using-{path.name}", 0.0):
            store.discard(path)
    except StoreBusy:
        return False
    return True


def remove(store: Store, manifest: Manifest, others: Iterable[Manifest] = (), forget: bool = False) -> int:
    """Remove a model's engines, unfinished downloads, and those artefacts that no manifest of `others` names. Returns the freed bytes.

    Digests recorded at first use stay, so that a later pull is held to them, unless `forget`. Raises StoreBusy, with nothing removed,
    when a process has an engine of the model open.
    """
    for engine in store.engines(manifest.name):
        with store.lock(f"using-{engine.folder.name}", 0.0):
            pass
    kept = {store.expected_sha256(file) for other in others if other.name != manifest.name for file in other.files.values()}
    paths = [store.root / "engines" / manifest.name, *_provider_engines(store, store.engines(manifest.name))]
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


def make_room(store: Store, needed_bytes: int, budget_bytes: Optional[int], keep: Collection[str]) -> List[Path]:
    """Evict until `needed_bytes` fit into the budget, if there is one, and onto the disk with a reserve. Returns what went."""
    short_bytes = needed_bytes + SPACE_RESERVE_BYTES - store.free_bytes()
    used_bytes = usage(store).total_bytes
    within_bytes = used_bytes - max(0, short_bytes)
    return evict(store, within_bytes if budget_bytes is None else min(within_bytes, budget_bytes - needed_bytes), 0, keep)


def evict(store: Store, budget_bytes: int, needed_bytes: int = 0, keep: Collection[str] = ()) -> List[Path]:
    """Remove what was not used for longest until `needed_bytes` more fit into `budget_bytes`. Returns what went.

    `keep` holds model names (of the engines of each runtime the last used one stays, with what providers made of it) and sha256s (those
    artefacts stay). Engines and artefacts that a process has open stay too, so the budget can remain exceeded: compare `usage` afterwards
    where that matters.
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
    for model in filter(Path.is_dir, (store.root / "engines").iterdir()):
        folders = sorted(model.iterdir(), key=lambda folder: folder.lstat().st_mtime, reverse=True)
        kept: Set[str] = set()
        for folder in folders:
            record = read_record(folder)
            if record is not None and model.name in keep and record.key.runtime not in kept:
                kept.add(record.key.runtime)
                continue
            yield Candidate(folder, _tree_bytes(folder), folder.lstat().st_mtime, f"using-{folder.name}")
    for path in store.blob_path("").iterdir():
        if path.name not in keep:
            yield Candidate(path, _tree_bytes(path), path.lstat().st_mtime, f"using-{path.name}")
    yield from _measured(store, keep)


def _measured(store: Store, keep: Collection[str]) -> Iterator[Candidate]:
    """What providers made of each graph, and single files of measurements."""
    kept = set(_provider_engines(store, (engine for name in keep if "/" not in name for engine in store.engines(name))))
    places = [path for path in (store.root / PROVIDER_FOLDER).glob("*") if path.is_dir()]
    for folder in (*places, store.root / TIMING_FOLDER, store.root / CALIBRATION_FOLDER):
        for path in folder.glob("*"):
            if path not in kept and path.suffix != ".lock":
                yield Candidate(path, _tree_bytes(path), path.lstat().st_mtime, f"using-{path.name}")


def _provider_engines(store: Store, engines: Iterable[StoredEngine]) -> List[Path]:
    """Folders of what providers made of these engines."""
    found: List[Path] = []
    for engine in engines:
        attempts = engine.record.verdict.get("attempts") or [{}]
        profiles = attempts[-1].get("notes", {}).get("opened_with", {}).get("profiles", {})
        files = {name: file.sha256 for name, file in engine.record.files.items() if name.startswith("model.onnx")}
        found.extend((store.root / PROVIDER_FOLDER).glob(f"*/{content_digest(files, profiles)}"))
    return found


def _tree_bytes(path: Path) -> int:
    """Size of a file or of all files below a folder; 0 where there is nothing."""
    if path.is_file():
        return path.stat().st_size
    return sum(item.lstat().st_size for item in path.rglob("*") if not item.is_dir())
