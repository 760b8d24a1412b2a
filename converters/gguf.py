"""Strict, bounded reader of GGUF files, versions 2 and 3.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file is untrusted: every count, length and
offset is checked against the size of the file before anything is allocated for it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from converters.decoder_source import Matrix
from converters.errors import ConversionError
from converters.quantised_blocks import BLOCK_LAYOUTS, BlockLayout

MAX_ENTRIES = 65_536
MAX_NAME_BYTES = 65_535
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 65_536

Scalar: TypeAlias = "int | float | bool | str"
Value: TypeAlias = "Scalar | list[str] | NDArray[np.generic]"

_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_ADVICE = "the file is damaged or not a GGUF model; fetch it again and compare its sha256"


@dataclass(frozen=True)
class Tensor:
    """One row of the tensor table. `shape` is outermost first (rows, columns): GGUF stores it the other way round."""

    name: str
    shape: tuple[int, ...]
    layout: BlockLayout
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """A mapped file: metadata, tensor table and the bytes. Nothing of the weights is read before it is asked for."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, Tensor]
    data: NDArray[np.uint8]

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Bytes of a tensor as [rows, blocks per row, bytes per block]: a view into the mapped file."""
        tensor = self.tensor(name)
        columns = tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        flat = self.data[tensor.offset : tensor.offset + tensor.size_bytes]
        return flat.reshape(rows, columns // tensor.layout.values, tensor.layout.bytes)

    def float32(self, name: str) -> NDArray[np.float32]:
        """The tensor dequantised to float32, in its own shape."""
        tensor = self.tensor(name)
        return tensor.layout.dequantise(self.raw(name)).reshape(tensor.shape)

    def matrix(self, name: str) -> Matrix:
        """Blocks where the tensor is quantised, else float16 or float32 [rows, columns]."""
        layout, raw = self.tensor(name).layout, self.raw(name)
        if layout.unpack is not None:
            return layout.unpack(raw)
        if layout.name == "F16":
            return raw.reshape(raw.shape[0], -1).view("<f2")
        return layout.dequantise(raw)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensor(name).shape

    def format(self, name: str) -> str:
        return self.tensor(name).layout.name

    def tensor(self, name: str) -> Tensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise ConversionError(f"{self.path.name} has no tensor {name!r}; it is not a complete model of its architecture") from None

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConversionError(f"{self.path.name}: {key} is {value!r}, not an integer; {_ADVICE}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConversionError(f"{self.path.name}: {key} is {value!r}, not a finite number; {_ADVICE}")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise ConversionError(f"{self.path.name}: {key} is {value!r}, not a text; {_ADVICE}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise ConversionError(f"{self.path.name}: {key} is {value!r}, not true or false; {_ADVICE}")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise ConversionError(f"{self.path.name}: {key} is missing or not a list of texts; {_ADVICE}")
        return value

    def numbers(self, key: str) -> NDArray[np.generic] | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise ConversionError(f"{self.path.name}: {key} is not a list of numbers; {_ADVICE}")
        return value

    def _value(self, key: str, default: Scalar | None) -> Value:
        value = self.metadata.get(key, default)
        if value is None:
            raise ConversionError(f"{self.path.name}: metadata {key!r} is missing; {_ADVICE}")
        return value


class _Cursor:
    """A position in the mapped bytes that cannot leave them."""

    def __init__(self, data: NDArray[np.uint8], name: str) -> None:
        self._bytes = memoryview(data.data)
        self._name = name
        self.position = 0

    def fail(self, what: str) -> ConversionError:
        return ConversionError(f"{self._name}: {what} (at byte {self.position} of {len(self._bytes)}); {_ADVICE}")

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self._bytes) - self.position:
            raise self.fail(f"{what} needs {count} bytes, {len(self._bytes) - self.position} are left")
        piece = self._bytes[self.position : self.position + count]
        self.position += count
        return piece

    def number(self, form: str, what: str) -> int | float:
        value: int | float = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        return value

    def count(self, form: str, limit: int, what: str) -> int:
        value = int(self.number(form, what))
        if value > limit:
            raise self.fail(f"{what} is {value}, more than the {limit} that can be")
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        size = self.count("<Q", len(self._bytes) if limit is None else limit, f"length of {what}")
        try:
            return str(self.take(size, what), "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error.reason}") from error

    def left(self) -> int:
        return len(self._bytes) - self.position


def read_gguf(path: Path) -> GgufFile:
    """Map a file and parse its header. Raises ConversionError on anything that does not fit the format, OSError if unreadable."""
    if path.stat().st_size < 24:
        raise ConversionError(f"{path.name} has {path.stat().st_size} bytes, too few for a GGUF header; {_ADVICE}")
    data: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
    cursor = _Cursor(data, path.name)
    if bytes(cursor.take(4, "magic")) != b"GGUF":
        raise cursor.fail("the first four bytes are not 'GGUF'")
    version = int(cursor.number("<I", "version"))
    if version not in (2, 3):
        raise cursor.fail(f"GGUF version {version} is neither 2 nor 3 (big-endian files are not supported)")
    tensor_count = cursor.count("<Q", MAX_ENTRIES, "number of tensors")
    entry_count = cursor.count("<Q", MAX_ENTRIES, "number of metadata entries")
    metadata: dict[str, Value] = {}
    for _ in range(entry_count):
        key = cursor.string("metadata key", MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} appears twice")
        metadata[key] = _metadata_value(cursor, key)
    tensors = _tensor_table(cursor, tensor_count, metadata)
    return GgufFile(path, metadata, tensors, data)


def _metadata_value(cursor: _Cursor, key: str) -> Value:
    kind = int(cursor.number("<I", f"type of {key!r}"))
    if kind == _STRING:
        return cursor.string(f"value of {key!r}")
    if kind == _ARRAY:
        return _metadata_array(cursor, key)
    if kind not in _NUMBERS:
        raise cursor.fail(f"{key!r} has the unknown type {kind}")
    value = cursor.number(_NUMBERS[kind], f"value of {key!r}")
    return bool(value) if kind == _BOOL else value


def _metadata_array(cursor: _Cursor, key: str) -> list[str] | NDArray[np.generic]:
    kind = int(cursor.number("<I", f"item type of {key!r}"))
    if kind == _STRING:
        # Each text takes at least the eight bytes of its length.
        count = cursor.count("<Q", cursor.left() // 8, f"number of items of {key!r}")
        return [cursor.string(f"item of {key!r}") for _ in range(count)]
    if kind not in _NUMBERS:
        raise cursor.fail(f"{key!r} is a list of the unsupported type {kind}")
    item = np.dtype(_NUMBERS[kind][1:]).newbyteorder("<") if kind != _BOOL else np.dtype(np.bool_)
    count = cursor.count("<Q", cursor.left() // item.itemsize, f"number of items of {key!r}")
    raw = np.frombuffer(cursor.take(count * item.itemsize, f"items of {key!r}"), dtype=np.uint8)
    return raw != 0 if kind == _BOOL else raw.view(item)


def _tensor_table(cursor: _Cursor, tensor_count: int, metadata: dict[str, Value]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for _ in range(tensor_count):
        tensor = _tensor(cursor)
        if tensor.name in tensors:
            raise cursor.fail(f"tensor {tensor.name!r} appears twice")
        tensors[tensor.name] = tensor
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r}, not a power of two up to {MAX_ALIGNMENT}")
    start = -(-cursor.position // alignment) * alignment
    placed: dict[str, Tensor] = {}
    end = 0
    for tensor in sorted(tensors.values(), key=lambda item: item.offset):
        if tensor.offset % alignment:
            raise cursor.fail(f"tensor {tensor.name!r} begins at {tensor.offset}, which is not a multiple of {alignment}")
        if tensor.offset < end:
            raise cursor.fail(f"tensor {tensor.name!r} begins at {tensor.offset}, inside the tensor before it")
        end = tensor.offset + tensor.size_bytes
        if start + end > cursor.position + cursor.left():
            raise cursor.fail(f"tensor {tensor.name!r} ends at {start + end}, behind the end of the file")
        placed[tensor.name] = Tensor(tensor.name, tensor.shape, tensor.layout, start + tensor.offset, tensor.size_bytes)
    return placed


def _tensor(cursor: _Cursor) -> Tensor:
    name = cursor.string("tensor name", MAX_NAME_BYTES)
    dimensions = cursor.count("<I", MAX_DIMENSIONS, f"number of dimensions of {name!r}")
    shape = tuple(int(cursor.number("<Q", f"shape of {name!r}")) for _ in range(dimensions))[::-1]
    kind = int(cursor.number("<I", f"type of {name!r}"))
    offset = int(cursor.number("<Q", f"offset of {name!r}"))
    if not shape or 0 in shape:
        raise cursor.fail(f"tensor {name!r} has the empty shape {shape}")
    layout = BLOCK_LAYOUTS.get(kind)
    if layout is None:
        known = ", ".join(layout.name for layout in BLOCK_LAYOUTS.values())
        raise ConversionError(f"tensor {name!r} has the GGML type {kind}, which is not read here; use a file with {known}", "unsupported")
    if shape[-1] % layout.values:
        raise cursor.fail(f"tensor {name!r} has {shape[-1]} columns, not a multiple of the {layout.values} of a {layout.name} block")
    return Tensor(name, shape, layout, offset, math.prod(shape) // layout.values * layout.bytes)
