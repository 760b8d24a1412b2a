"""Strict, bounded reader of safetensors files, alone or in shards.

The format: 8 bytes with the length of the header (little-endian), the header as a JSON object, then the tensors back to back without
holes (https://huggingface.co/docs/safetensors). A file is untrusted: nothing is allocated before it is checked against the file's size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import ConversionError, unsupported
from converters.json_object import json_object, read_json_object
from converters.quantised_blocks import Float

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 8
SHARD = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors$")
_ADVICE = "the file is damaged or not safetensors; fetch it again and compare its sha256"

# Bytes of one number; of these only the floats below are read.
_BYTES = {
    1: ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"),
    2: ("I16", "U16", "F16", "BF16"),
    4: ("I32", "U32", "F32"),
    8: ("I64", "U64", "F64"),
}
_SIZES = {kind: size for size, kinds in _BYTES.items() for kind in kinds}
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """`data`: the bytes, a view into the mapped file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def numbers(self) -> NDArray[np.float32] | NDArray[np.float16]:
        """In the stored type, but bfloat16 as float32. Raises ConversionError for other types."""
        if self.kind == "F16":
            return self.data.view("<f2").reshape(self.shape)
        return self.float32()

    def float32(self) -> Float:
        if self.kind not in _FLOATS:
            raise unsupported(f"tensor {self.name!r} is {self.kind}, which is not read as a weight here; use one of {', '.join(_FLOATS)}")
        if self.kind == "BF16":
            return (self.data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        return self.data.view("<f2" if self.kind == "F16" else "<f4").astype(np.float32, copy=False).reshape(self.shape)


def read_safetensors(path: Path, name: str = "") -> dict[str, StoredTensor]:
    """Map a file and parse its header; `name` is what messages call it. Raises ConversionError, OSError."""
    name = name or path.name
    size = path.stat().st_size
    if size < 10:
        raise ConversionError(f"{name} has {size} bytes, too few for a safetensors header; {_ADVICE}")
    data: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
    header_bytes = int.from_bytes(data[:8].tobytes(), "little")
    if header_bytes > min(MAX_HEADER_BYTES, size - 8):
        raise ConversionError(f"{name}: a header of {header_bytes} bytes does not fit; {_ADVICE}")
    header = json_object(data[8 : 8 + header_bytes].tobytes(), f"header of {name}")
    entries = {key: value for key, value in header.values.items() if key != "__metadata__"}
    if len(entries) > MAX_TENSORS:
        raise ConversionError(f"{name} has {len(entries)} tensors, more than {MAX_TENSORS}")
    body = data[8 + header_bytes :]
    return _placed({key: _entry(key, value, name) for key, value in entries.items()}, body, name)


def read_shards(index: Path, shards: Mapping[str, Path]) -> dict[str, StoredTensor]:
    """The tensors of `model.safetensors.index.json`, each from the shard named there; `shards`: the fetched files by published name."""
    places = read_json_object(index, "model.safetensors.index.json", MAX_HEADER_BYTES).object("weight_map").values
    names = set(places.values()) if all(isinstance(shard, str) for shard in places.values()) else {""}
    for shard in sorted(names):
        if not SHARD.match(shard):
            raise ConversionError(f"the index of the weights names the file {shard!r}, which is no plain name of a shard; {_ADVICE}")
        if shard not in shards:
            raise ConversionError(f"the index of the weights names {shard}, which was not fetched; add it to the manifest's [files]")
    read = {shard: read_safetensors(shards[shard], shard) for shard in sorted(names)}
    for name, shard in places.items():
        if name not in read[shard]:
            raise ConversionError(f"{shard} has no tensor {name!r}, which the index promises; fetch all files of one revision")
    return {name: read[shard][name] for name, shard in places.items()}


def _entry(name: str, value: Any, file: str) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, begin and end of a tensor, consistent in themselves."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ConversionError(f"{file}: the entry of tensor {name!r} is not of the format; {_ADVICE}")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in _SIZES:
        raise unsupported(f"{file}: tensor {name!r} has the unknown type {str(kind)[:40]!r}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS or not _are_counts(offsets) or len(offsets) != 2:
        raise ConversionError(f"{file}: tensor {name!r} has no proper shape or offsets; {_ADVICE}")
    begin, end = offsets
    if end - begin != math.prod(shape) * _SIZES[kind]:
        raise ConversionError(f"{file}: tensor {name!r} of shape {shape} and type {kind} cannot have {end - begin} bytes; {_ADVICE}")
    return kind, tuple(shape), begin, end


def _placed(entries: Mapping[str, tuple[str, tuple[int, ...], int, int]], body: NDArray[np.uint8], file: str) -> dict[str, StoredTensor]:
    """The tensors, which lie back to back from the first byte to the last."""
    reached = 0
    tensors: dict[str, StoredTensor] = {}
    for name, (kind, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            raise ConversionError(f"{file}: tensor {name!r} begins at {begin}, the one before it ends at {reached}; {_ADVICE}")
        if end > len(body):
            raise ConversionError(f"{file}: tensor {name!r} ends at {end}, behind the end of the file; {_ADVICE}")
        tensors[name] = StoredTensor(name, kind, shape, body[begin:end])
        reached = end
    if reached != len(body):
        raise ConversionError(f"{file}: {len(body) - reached} bytes at its end belong to no tensor; {_ADVICE}")
    return tensors


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
