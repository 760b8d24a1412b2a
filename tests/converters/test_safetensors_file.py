from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.errors import ConversionError
from converters.safetensors_file import read_safetensors, read_shards
from tests.converters.tiny_transformers import write_safetensors

MATRIX = np.arange(6, dtype=np.float32).reshape(2, 3)


def written(path: Path, header: Any, body: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(kind: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": offsets, **more}


def test_reads_floats_of_three_widths(tmp_path: Path) -> None:
    halves, brains = MATRIX.astype(np.float16), (MATRIX.view(np.uint32) >> 16).astype(np.uint16)
    path = write_safetensors(tmp_path / "m.safetensors", {"a": MATRIX, "b": halves, "c": brains, "d": np.arange(3)})
    tensors = read_safetensors(path)
    assert [tensors[name].float32().tolist() for name in "abc"] == [MATRIX.tolist()] * 3
    assert [tensors[name].numbers().dtype for name in "abc"] == [np.float32, np.float16, np.float32]
    with pytest.raises(ConversionError, match="I64"):
        tensors["d"].float32()


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (lambda path: written(path, b"", b""), "too few"),
    "header longer than the file": (lambda path: written(path, {"a": entry()}, bytes(8), 1 << 40), "does not fit"),
    "not JSON": (lambda path: written(path, b"{]      ", bytes(8)), "not JSON"),
    "a list": (lambda path: written(path, b"[1, 2, 3]", bytes(8)), "no JSON object"),
    "deep": (lambda path: written(path, b"[" * 200_000, bytes(8)), "not JSON"),
    "a name twice": (lambda path: written(path, b'{"a": 1, "a": 2}', bytes(8)), "twice"),
    "entry without offsets": (lambda path: written(path, {"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "not of the format"),
    "entry with more": (lambda path: written(path, {"a": entry(more=1)}, bytes(8)), "not of the format"),
    "unknown type": (lambda path: written(path, {"a": entry("F12")}, bytes(8)), "unknown type"),
    "negative size": (lambda path: written(path, {"a": entry(shape=[-2, -1])}, bytes(8)), "proper shape"),
    "size that is no integer": (lambda path: written(path, {"a": entry(shape=[True, 2])}, bytes(8)), "proper shape"),
    "huge product": (lambda path: written(path, {"a": entry(shape=[1 << 40, 1 << 40])}, bytes(8)), "cannot have"),
    "too many dimensions": (lambda path: written(path, {"a": entry(shape=[1] * 9)}, bytes(8)), "proper shape"),
    "three offsets": (lambda path: written(path, {"a": entry(offsets=[0, 8, 8])}, bytes(8)), "proper shape"),
    "behind the end": (lambda path: written(path, {"a": entry(shape=[4], offsets=[0, 16])}, bytes(8)), "behind the end"),
    "overlap": (lambda path: written(path, {"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "the one before it ends"),
    "hole": (lambda path: written(path, {"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "the one before it ends"),
    "bytes that belong to nothing": (lambda path: written(path, {"a": entry()}, bytes(12)), "belong to no tensor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_malformed_file_is_refused(tmp_path: Path, case: str) -> None:
    write, word = BROKEN[case]
    with pytest.raises(ConversionError, match=word):
        read_safetensors(write(tmp_path / "m.safetensors"))


def test_shards_are_read_where_the_index_says(tmp_path: Path) -> None:
    shards = {
        name: write_safetensors(tmp_path / digest, {key: MATRIX})
        for name, digest, key in (("m-1.safetensors", "d1", "a"), ("m-2.safetensors", "d2", "b"))
    }
    index = tmp_path / "index"

    def read(places: Any) -> list[str]:
        index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
        return sorted(read_shards(index, shards))

    assert read({"a": "m-1.safetensors", "b": "m-2.safetensors"}) == ["a", "b"]
    for places, word in (
        ({"a": "../m-1.safetensors"}, "no plain name"),
        ({"a": 7}, "no plain name"),
        ({"a": "m-3.safetensors"}, "not fetched"),
        ({"b": "m-1.safetensors"}, "promises"),
    ):
        with pytest.raises(ConversionError, match=word):
            read(places)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_does_worse_than_a_refusal(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m.safetensors"
    content = bytearray(write_safetensors(path, {"a": MATRIX, "b": MATRIX.astype(np.float16)}).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        tensors = read_safetensors(path)
        for tensor in tensors.values():
            tensor.float32()
    except ConversionError:
        return
