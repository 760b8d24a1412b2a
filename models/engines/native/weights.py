"""The file `model.native`: the weights of a decoder in the order in which the native engine reads them, mapped and never copied.

    8 bytes   HSNATIVE
    8 bytes   length of the header, little-endian
    header    JSON: {"format", "cpu", "epsilon", "inner", "is_fine", "arrays" and "matrices": {name: {"offset", "bytes", …}}}
    data      each tensor at a multiple of 64 bytes

A tensor is a float32 array ({"count"}) or a matrix ({"rows", "columns", "bits", "has_offset", "is_wide"}) as products.h describes it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Dict, Mapping

import numpy as np

from models.engines import EngineError
from models.record import RecordError, from_mapping, to_mapping

ARTEFACT = "model.native"
LIBRARY = "decoder.so"
MAGIC = b"HSNATIVE"
FORMAT = 2
ALIGNMENT = 64
LANES = 16
BLOCK = 32
MAX_HEADER_BYTES = 8 << 20


@dataclass(frozen=True)
class Array:
    """float32 [count]."""

    offset: int
    bytes: int
    count: int


@dataclass(frozen=True)
class PackedMatrix:
    """`rows` is a multiple of 16, `columns` of 32; `is_wide`: scales and offsets are float32, else float16."""

    offset: int
    bytes: int
    rows: int
    columns: int
    bits: int
    has_offset: bool
    is_wide: bool

    def expected_bytes(self) -> int:
        factors = (2 if self.has_offset else 1) * LANES * (4 if self.is_wide else 2)
        return self.rows // LANES * (self.columns // BLOCK) * (LANES * BLOCK * self.bits // 8 + factors)


@dataclass(frozen=True)
class Header:
    """`cpu`: whose instructions the library beside it uses; `inner`: width of the feed-forward part; `is_fine`: activations are rounded to
    15 bits, else to 8."""

    cpu: str
    epsilon: float
    inner: int
    is_fine: bool
    arrays: Dict[str, Array]
    matrices: Dict[str, PackedMatrix]
    format: int = FORMAT


class Weights:
    """An open file. Addresses stay valid as long as this object lives."""

    def __init__(self, path: Path, header: Header, data: np.ndarray) -> None:
        self.path = path
        self.header = header
        self._data = data

    def array(self, name: str) -> np.ndarray:
        """float32 [count], a view into the file."""
        entry = self.header.arrays.get(name)
        if entry is None:
            raise EngineError(f"{self.path} has no array {name!r}; convert the model again")
        view: np.ndarray = self._data[entry.offset : entry.offset + entry.bytes].view(np.float32)
        return view

    def matrix(self, name: str) -> PackedMatrix:
        entry = self.header.matrices.get(name)
        if entry is None:
            raise EngineError(f"{self.path} has no matrix {name!r}; convert the model again")
        return entry

    def address(self, entry: PackedMatrix) -> int:
        return int(self._data.ctypes.data) + entry.offset


def open_weights(path: Path) -> Weights:
    """Map the file and check that all it names lies inside. Raises EngineError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(16)
            length = int.from_bytes(start[8:], "little")
            if start[:8] != MAGIC or not 0 < length <= min(MAX_HEADER_BYTES, size):
                raise EngineError(f"{path} is no {ARTEFACT}; convert the model again")
            header = from_mapping(Header, json.loads(stream.read(length).decode()))
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError, RecordError) as error:
        raise EngineError(f"{path} cannot be read ({error}); convert the model again") from error
    if header.format != FORMAT:
        raise EngineError(f"{path} has format {header.format}, this engine reads {FORMAT}; convert the model again")
    for name, array in header.arrays.items():
        _check(name, array, array.count > 0 and array.bytes == 4 * array.count, size, path)
    for name, matrix in header.matrices.items():
        is_whole = matrix.rows > 0 and matrix.columns > 0 and matrix.rows % LANES == 0 and matrix.columns % BLOCK == 0
        _check(name, matrix, is_whole and matrix.bits in (4, 8) and matrix.bytes == matrix.expected_bytes(), size, path)
    return Weights(path, header, data)


class WeightsWriter:
    """Collects tensors in a scratch file beside, for the header comes first and says where they lie."""

    def __init__(self, scratch: BinaryIO) -> None:
        self._scratch = scratch
        self._arrays: Dict[str, Array] = {}
        self._matrices: Dict[str, PackedMatrix] = {}
        self._end = 0

    def array(self, name: str, values: np.ndarray) -> None:
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        self._arrays[name] = Array(self._append(flat), flat.nbytes, flat.size)

    def matrix(self, name: str, records: np.ndarray, rows: int, columns: int, bits: int, has_offset: bool, is_wide: bool) -> None:
        """`records`: uint8, as products.h describes them."""
        entry = PackedMatrix(self._append(records), records.nbytes, rows, columns, bits, has_offset, is_wide)
        if entry.bytes != entry.expected_bytes():
            raise ValueError(f"{name}: {entry.bytes} bytes of records, {entry.expected_bytes()} expected of {entry}")
        self._matrices[name] = entry

    def write(self, path: Path, cpu: str, epsilon: float, inner: int, is_fine: bool) -> None:
        header = to_mapping(Header(cpu, epsilon, inner, is_fine, self._arrays, self._matrices))
        text = _header(header, 0)
        start = _aligned(16 + len(text) + 20 * (len(self._arrays) + len(self._matrices)))
        text = _header(header, start).ljust(start - 16)
        self._scratch.seek(0)
        with path.open("wb") as stream:
            stream.write(MAGIC + len(text).to_bytes(8, "little") + text)
            while True:
                piece = self._scratch.read(1 << 22)
                if not piece:
                    return
                stream.write(piece)

    def _append(self, values: np.ndarray) -> int:
        offset = _aligned(self._end)
        self._scratch.write(b"\0" * (offset - self._end))
        self._scratch.write(np.ascontiguousarray(values).tobytes())
        self._end = offset + values.nbytes
        return offset


def cpu_identity(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Architecture and a digest of the instruction sets: a library compiled for one does not run where some are missing."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.split(":")[0].strip() in ("flags", "Features")), [])
    digest = hashlib.sha256(" ".join(sorted(set(flags))).encode()).hexdigest()[:12]
    return f"{platform.machine()}/{digest}"


def _check(name: str, entry: Any, is_whole: bool, size: int, path: Path) -> None:
    if not is_whole or entry.offset < 0 or entry.offset % ALIGNMENT or entry.offset + entry.bytes > size:
        raise EngineError(f"{path}: tensor {name!r} does not lie whole in the file; convert the model again")


def _header(header: Mapping[str, Any], start: int) -> bytes:
    moved = dict(header)
    for kind in ("arrays", "matrices"):
        moved[kind] = {name: {**entry, "offset": entry["offset"] + start} for name, entry in header[kind].items()}
    return json.dumps(moved, separators=(",", ":")).encode()


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
