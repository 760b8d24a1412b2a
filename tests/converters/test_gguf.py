from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.errors import ConversionError
from converters.gguf import read_gguf
from tests.converters.tiny_gguf import RawTensor, Recipe, ones, write_decoder, write_gguf

MATRIX = RawTensor("F32", (2, 3), np.arange(6, dtype="<f4").tobytes())


def header(version: int, tensors: int, entries: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + rest + b"\0" * 64


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 128])
def test_reads_metadata_and_tensors(tmp_path: Path, version: int, alignment: int) -> None:
    metadata = {
        "general.alignment": alignment,
        "a.text": "häuser",
        "a.flag": True,
        "a.number": 0.5,
        "a.list": ["x", ""],
        "a.array": np.arange(3, dtype=np.int32),
    }
    path = write_gguf(tmp_path / "m.gguf", metadata, {"one": ones(5), "matrix": MATRIX}, version, alignment)
    gguf = read_gguf(path)
    assert (gguf.text("a.text"), gguf.flag("a.flag", False), gguf.number("a.number"), gguf.texts("a.list")) == (
        "häuser",
        True,
        0.5,
        ["x", ""],
    )
    numbers = gguf.numbers("a.array")
    assert numbers is not None and numbers.tolist() == [0, 1, 2]
    assert gguf.float32("matrix").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert gguf.float32("one").tolist() == [1] * 5


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "not GGUF": (b"ONNX" + bytes(60), "first four bytes"),
    "version 1": (header(1, 0, 0), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "big-endian"),
    "huge tensor count": (header(3, 1 << 60, 0), "number of tensors is"),
    "huge entry count": (header(3, 0, 1 << 63), "number of metadata entries is"),
    "huge key": (header(3, 0, 1, struct.pack("<Q", 1 << 40)), "length of metadata key"),
    "huge text": (header(3, 0, 1, text("k") + struct.pack("<IQ", 8, 1 << 50)), "length of value"),
    "huge list of texts": (header(3, 0, 1, text("k") + struct.pack("<IIQ", 9, 8, 1 << 40)), "number of items"),
    "huge list of numbers": (header(3, 0, 1, text("k") + struct.pack("<IIQ", 9, 10, 1 << 61)), "number of items"),
    "nested list": (header(3, 0, 1, text("k") + struct.pack("<IIQ", 9, 9, 1)), "unsupported type 9"),
    "unknown value type": (header(3, 0, 1, text("k") + struct.pack("<I", 77)), "unknown type 77"),
    "key twice": (header(3, 0, 2, (text("k") + struct.pack("<IB", 0, 1)) * 2), "appears twice"),
    "key not UTF-8": (header(3, 0, 1, struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
    "five dimensions": (header(3, 1, 0, text("t") + struct.pack("<I", 5)), "number of dimensions"),
    "no columns": (header(3, 1, 0, text("t") + struct.pack("<IQIQ", 1, 0, 0, 0)), "empty shape"),
    "product overflows": (header(3, 1, 0, text("t") + struct.pack("<IQQIQ", 2, 1 << 63, 1 << 63, 0, 0)), "behind the end"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_malformed_header_is_refused_without_allocation(tmp_path: Path, case: str) -> None:
    content, word = HEADERS[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ConversionError, match=word):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


TABLES: dict[str, tuple[dict[str, RawTensor], str]] = {
    "overlap": ({"a": ones(64), "b": RawTensor("F32", (8,), b"", offset=32)}, "inside the tensor before"),
    "behind the end": ({"a": RawTensor("F32", (1 << 20,), b"")}, "behind the end"),
    "offset behind the end": ({"a": RawTensor("F32", (8,), b"", offset=1 << 40)}, "behind the end"),
    "unaligned": ({"a": RawTensor("F32", (1,), bytes(64), offset=4)}, "not a multiple of 32"),
    "broken block": ({"a": RawTensor("Q4_0", (33,), bytes(64))}, "multiple of the 32"),
    "unknown type": ({"a": RawTensor(19, (32,), bytes(64))}, "GGML type 19"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_malformed_tensor_table_is_refused(tmp_path: Path, case: str) -> None:
    tensors, word = TABLES[case]
    with pytest.raises(ConversionError, match=word):
        read_gguf(write_gguf(tmp_path / "m.gguf", {}, tensors))


@pytest.mark.parametrize("alignment", [0, 3, 1 << 20])
def test_an_impossible_alignment_is_refused(tmp_path: Path, alignment: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"general.alignment": alignment}, {"a": ones(1)})
    with pytest.raises(ConversionError, match="alignment"):
        read_gguf(path)


ACCESS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: read_gguf(path).integer("nowhere"),
    "text for a number": lambda path: read_gguf(path).integer("general.architecture"),
    "number for a text": lambda path: read_gguf(path).text("llama.block_count"),
    "not a list": lambda path: read_gguf(path).texts("general.architecture"),
    "no such tensor": lambda path: read_gguf(path).float32("nowhere"),
}


@pytest.mark.parametrize("case", ACCESS)
def test_a_wrong_entry_is_named(tmp_path: Path, case: str) -> None:
    with pytest.raises(ConversionError):
        ACCESS[case](write_decoder(tmp_path / "m.gguf", Recipe()))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_the_header_does_worse_than_a_refusal(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m.gguf"
    content = bytearray(
        write_gguf(path, {"a.b": "text", "c": ["x", "yz"], "d": np.arange(4, dtype=np.int32)}, {"t": ones(8), "m": MATRIX}).read_bytes()
    )
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        gguf = read_gguf(path)
    except ConversionError:
        return
    for name in gguf.tensors:
        gguf.float32(name)
