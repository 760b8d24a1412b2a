"""Each format against a scalar transcription of its description, byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest

from converters.quantised_blocks import BLOCK_LAYOUTS, BlockLayout
from tests.converters.tiny_gguf import KINDS, random_tensor


def half(block: bytes, start: int) -> float:
    value: float = struct.unpack("<e", block[start : start + 2])[0]
    return value


def nibble(packed: bytes, index: int) -> int:
    """The first half of a run lies in the low halves of its bytes, the second in the high ones."""
    width = len(packed)
    return packed[index] & 15 if index < width else packed[index - width] >> 4


def fifth(block: bytes, start: int, index: int) -> int:
    bits: int = struct.unpack("<I", block[start : start + 4])[0]
    return (bits >> index & 1) << 4


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def k_scale(block: bytes, group: int) -> tuple[int, int]:
    packed = block[4:16]
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    return (
        (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4,
        (packed[group + 4] >> 4) | (packed[group] >> 6) << 4,
    )


def k_value(block: bytes, index: int, code: int) -> float:
    scale, minimum = k_scale(block, index // 32)
    return half(block, 0) * scale * code - half(block, 2) * minimum


def k_nibble(packed: bytes, index: int) -> int:
    run = index // 64
    return nibble(packed[32 * run : 32 * run + 32], index % 64)


def q6_k(block: bytes, index: int) -> float:
    part, place = divmod(index, 128)
    quarter, column = divmod(place, 32)
    low = block[64 * part + column + 32 * (quarter % 2)]
    low = low & 15 if quarter < 2 else low >> 4
    high = block[128 + 32 * part + column] >> 2 * quarter & 3
    return half(block, 208) * signed(block[192 + 8 * part + 2 * quarter + column // 16]) * ((low | high << 4) - 32)


SCALAR: dict[str, Callable[[bytes, int], float]] = {
    "Q4_0": lambda block, index: half(block, 0) * (nibble(block[2:18], index) - 8),
    "Q4_1": lambda block, index: half(block, 0) * nibble(block[4:20], index) + half(block, 2),
    "Q5_0": lambda block, index: half(block, 0) * ((nibble(block[6:22], index) | fifth(block, 2, index)) - 16),
    "Q5_1": lambda block, index: half(block, 0) * (nibble(block[8:24], index) | fifth(block, 4, index)) + half(block, 2),
    "Q8_0": lambda block, index: half(block, 0) * signed(block[2 + index]),
    "Q4_K": lambda block, index: k_value(block, index, k_nibble(block[16:144], index)),
    "Q5_K": lambda block, index: k_value(block, index, k_nibble(block[48:176], index) | (block[16 + index % 32] >> index // 32 & 1) << 4),
    "Q6_K": q6_k,
}


@pytest.mark.parametrize("name", SCALAR)
def test_unpacking_follows_the_description(name: str) -> None:
    layout = BLOCK_LAYOUTS[KINDS[name]]
    tensor = random_tensor(np.random.default_rng(1), name, 3, 2 * layout.values)
    raw = np.frombuffer(tensor.data, np.uint8).reshape(3, 2, layout.bytes)
    expected = [[SCALAR[name](raw[row, block].tobytes(), index) for block in (0, 1) for index in range(layout.values)] for row in range(3)]
    found = layout.dequantise(raw)
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-6, atol=1e-8)
    assert layout.unpack is not None
    blocks = layout.unpack(raw)
    if blocks.bits == 4:
        assert blocks.codes.min() >= -8
        assert blocks.codes.max() <= 7


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_floats_are_read_as_they_are(name: str) -> None:
    layout = BLOCK_LAYOUTS[KINDS[name]]
    tensor = random_tensor(np.random.default_rng(1), name, 2, 5)
    found = layout.dequantise(np.frombuffer(tensor.data, np.uint8).reshape(2, 5, layout.bytes))
    truth = (np.random.default_rng(1).standard_normal((2, 5)) * 0.05).astype(np.float32)
    np.testing.assert_allclose(found, truth, rtol={"F32": 0, "F16": 1e-3, "BF16": 8e-3}[name])


@pytest.mark.parametrize("layout", BLOCK_LAYOUTS.values(), ids=lambda layout: layout.name)
def test_unpacking_equals_that_of_the_format_s_own_library(layout: BlockLayout) -> None:
    quants = pytest.importorskip("gguf.quants")
    tensor = random_tensor(np.random.default_rng(2), layout.name, 4, 3 * layout.values)
    raw = np.frombuffer(tensor.data, np.uint8).reshape(4, 3, layout.bytes)
    expected = quants.dequantize(raw.reshape(4, -1), quants.GGMLQuantizationType[layout.name])
    np.testing.assert_allclose(layout.dequantise(raw), expected, rtol=1e-6, atol=1e-8)
