"""What the store knows of one engine: the key that makes it reusable and the record that lies beside its files."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Dict, Mapping, Optional

from models.record import RecordError, from_mapping, to_mapping

RECORD_NAME = "engine.json"
RECORD_FORMAT = 1
RECORD_BYTES_MAX = 4 << 20


@dataclass(frozen=True)
class EngineKey:
    """An engine may be reused exactly when all of this is equal.

    model      name of the manifest; the folder of the engine lies below it
    manifest   `manifest_digest(manifest)`
    sources    role → sha256 of the artefact that was converted
    converter  name and version of the converting code, e.g. `onnx_from_gguf/1`: new code builds anew
    runtime    e.g. `onnxruntime` 1.23.0, `tensorrt` 10.3.0
    device     `cpu`, or GPU name and SM, e.g. `Orin/sm_87`: a plan of one GPU does not run on another
    options    everything else that changes the result: `l4t`, `calibration` (a digest), `provider` (of ONNX Runtime, where it is not the
               CPU's) and `tensorrt` (the version behind that provider)
    """

    model: str
    manifest: str
    sources: Dict[str, str]
    converter: str
    runtime: str
    runtime_version: str
    device: str
    precision: str
    options: Dict[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """First 32 hex digits of the sha256 over the canonical JSON of the key."""
        text = json.dumps(to_mapping(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class EngineFile:
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class EngineRecord:
    """The content of `engine.json`. `verdict` and `versions` are the converter's; `created_at` is UTC, for people only."""

    key: EngineKey
    files: Dict[str, EngineFile]
    verdict: Dict[str, Any]
    versions: Dict[str, str]
    created_at: str
    format: int = RECORD_FORMAT


@dataclass(frozen=True)
class StoredEngine:
    """An engine on disk whose record is whole and whose files have the recorded sizes."""

    folder: Path
    record: EngineRecord

    def path(self, name: str) -> Path:
        """A file of the engine. Raises KeyError when the record has no such file."""
        if name not in self.record.files:
            raise KeyError(f"engine {self.folder} has no file {name!r}; it has {', '.join(sorted(self.record.files))}")
        return self.folder / name

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.record.files.values())


def content_digest(files: Mapping[str, str], profiles: Mapping[str, Any]) -> str:
    """Of all that a provider makes its own engine of: name → sha256 of graph and weights, and the shapes. The same before an engine is
    published as after, so what was proven is what serves."""
    text = json.dumps([sorted(files.items()), sorted(profiles.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def proven_provider(key: EngineKey) -> str:
    """The execution provider of ONNX Runtime that the gate ran an engine on."""
    return key.options.get("provider", "cpu")


def published_precision(record: EngineRecord) -> str:
    """Where the ladder ended, without the parts that it kept in float32; of a record without a verdict where it began."""
    words = str(record.verdict.get("precision") or record.key.precision).split()
    return words[0] if words else ""


def record_bytes(record: EngineRecord) -> bytes:
    return json.dumps(to_mapping(record), indent=1, sort_keys=True).encode()


def is_inside(name: str) -> bool:
    """Whether a relative path stays below the folder it is joined to."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def read_record(folder: Path) -> Optional[EngineRecord]:
    """The record of a folder, or None when it is missing, damaged, of another key or a link."""
    path = folder / RECORD_NAME
    try:
        if folder.is_symlink() or path.is_symlink():
            return None
        with path.open("rb") as stream:
            text = stream.read(RECORD_BYTES_MAX)
        record = from_mapping(EngineRecord, json.loads(text.decode()))
        whole = record.format == RECORD_FORMAT and record.key.digest() == folder.name
        whole = whole and bool(record.files) and all(map(is_inside, record.files))
    except (OSError, ValueError, RecordError):
        return None
    return record if whole else None


def read_engine(folder: Path) -> Optional[StoredEngine]:
    """The engine of a folder, or None when its record or one of its files is missing, truncated or of another key, or when something lies
    there that the record does not name: such an engine is as good as absent, for it was never published whole or was touched since."""
    record = read_record(folder)
    if record is None:
        return None
    try:
        whole = file_sizes(folder) == {name: file.size_bytes for name, file in record.files.items()}
    except OSError:
        return None
    return StoredEngine(folder, record) if whole else None


def file_sizes(folder: Path) -> Dict[str, int]:
    """Size of each file below an engine's folder, but not of its record; -1 for a link or anything else that is no plain file."""
    sizes: Dict[str, int] = {}
    for path in folder.rglob("*"):
        facts = path.lstat()
        name = path.relative_to(folder).as_posix()
        if name != RECORD_NAME and not stat.S_ISDIR(facts.st_mode):
            sizes[name] = facts.st_size if stat.S_ISREG(facts.st_mode) else -1
    return sizes
