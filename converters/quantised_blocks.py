"""GGML's weight formats as numbers: value = scale * code + offset, per block of 16 or 32 neighbouring columns.

Layouts after ggml's `ggml-common.h` and `ggml-quants.c` (https://github.com/ggml-org/ggml). The unpacking is exact: codes are the
stored integers, scales and offsets are products of the stored float16 numbers and small integers, computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Raw = NDArray[np.uint8]
Float = NDArray[np.float32]


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix [rows, blocks * width]: `scale * code + offset`.

    codes   int8 [rows, blocks, width]; within -8..7 if bits is 4
    scale   float32 [rows, blocks]
    offset  float32 [rows, blocks], or None where it is zero
    """

    codes: NDArray[np.int8]
    scale: Float
    offset: Float | None
    bits: int

    @property
    def width(self) -> int:
        return int(self.codes.shape[2])

    def float32(self) -> Float:
        """float32 [rows, columns]."""
        values = self.codes * self.scale[:, :, None]
        if self.offset is not None:
            values += self.offset[:, :, None]
        return values.reshape(values.shape[0], -1)


@dataclass(frozen=True)
class BlockLayout:
    """One GGML type: `values` numbers in `bytes` bytes. `unpack` takes raw [rows, blocks, bytes]; plain float types have none."""

    name: str
    values: int
    bytes: int
    unpack: Callable[[Raw], Blocks] | None

    def dequantise(self, raw: Raw) -> Float:
        """float32 [rows, columns] of raw [rows, blocks, bytes]."""
        if self.unpack is not None:
            return self.unpack(raw).float32()
        flat = raw.reshape(raw.shape[0], -1)
        if self.name == "BF16":
            return (flat.view("<u2").astype(np.uint32) << 16).view(np.float32)
        return flat.view("<f2" if self.name == "F16" else "<f4").astype(np.float32)


def _half(raw: Raw, start: int) -> Float:
    """The float16 at byte `start` of each block as float32 [rows, blocks]."""
    return np.ascontiguousarray(raw[:, :, start : start + 2]).view("<f2")[:, :, 0].astype(np.float32)


def _nibbles(packed: Raw) -> NDArray[np.int8]:
    """Low halves, then high halves of each byte along the last axis."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int8)


def _fifth_bits(raw: Raw, start: int) -> NDArray[np.int8]:
    return np.unpackbits(raw[:, :, start : start + 4], axis=-1, bitorder="little").astype(np.int8) << 4


def _q4_0(raw: Raw) -> Blocks:
    return Blocks(_nibbles(raw[:, :, 2:18]) - np.int8(8), _half(raw, 0), None, 4)


def _q4_1(raw: Raw) -> Blocks:
    scale = _half(raw, 0)
    return Blocks(_nibbles(raw[:, :, 4:20]) - np.int8(8), scale, _half(raw, 2) + 8 * scale, 4)


def _q5_0(raw: Raw) -> Blocks:
    codes = _nibbles(raw[:, :, 6:22]) | _fifth_bits(raw, 2)
    return Blocks(codes - np.int8(16), _half(raw, 0), None, 8)


def _q5_1(raw: Raw) -> Blocks:
    codes = _nibbles(raw[:, :, 8:24]) | _fifth_bits(raw, 4)
    return Blocks(codes, _half(raw, 0), _half(raw, 2), 8)


def _q8_0(raw: Raw) -> Blocks:
    return Blocks(raw[:, :, 2:34].view(np.int8), _half(raw, 0), None, 8)


def _k_scales(raw: Raw) -> tuple[Float, Float]:
    """Scales and minima of the eight groups of 32 in a Q4_K or Q5_K super-block, each float32 [rows, blocks, 8]."""
    packed = raw[:, :, 4:16]
    low, middle, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=-1)
    return _half(raw, 0)[..., None] * scales.astype(np.float32), _half(raw, 2)[..., None] * minima.astype(np.float32)


def _k_nibbles(packed: Raw) -> NDArray[np.int8]:
    """[rows, blocks, 8, 32]: each run of 32 bytes holds two groups, one in the low and one in the high halves."""
    runs = packed.reshape(*packed.shape[:2], 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=3).reshape(*packed.shape[:2], 8, 32).astype(np.int8)


def _groups(codes: NDArray[np.int8], scale: Float, offset: Float | None, bits: int) -> Blocks:
    """Super-blocks [rows, blocks, groups, width] as plain blocks."""
    rows = codes.shape[0]
    return Blocks(
        codes.reshape(rows, -1, codes.shape[3]), scale.reshape(rows, -1), None if offset is None else offset.reshape(rows, -1), bits
    )


def _q4_k(raw: Raw) -> Blocks:
    scale, minimum = _k_scales(raw)
    return _groups(_k_nibbles(raw[:, :, 16:144]) - np.int8(8), scale, 8 * scale - minimum, 4)


def _q5_k(raw: Raw) -> Blocks:
    scale, minimum = _k_scales(raw)
    bits = np.unpackbits(raw[:, :, 16:48], axis=-1, bitorder="little").reshape(*raw.shape[:2], 32, 8)
    codes = _k_nibbles(raw[:, :, 48:176]) | (np.swapaxes(bits, 2, 3).astype(np.int8) << 4)
    return _groups(codes, scale, -minimum, 8)


def _q6_k(raw: Raw) -> Blocks:
    rows, blocks = raw.shape[:2]
    low = raw[:, :, 0:128].reshape(rows, blocks, 2, 2, 32)
    high = raw[:, :, 128:192].reshape(rows, blocks, 2, 1, 32)
    # Each half of 128 values: bytes 0..31 and 32..63 give the low four bits of values 0..63 and, in their high halves, of 64..127.
    nibbles = np.concatenate([low & 15, low >> 4], axis=3)
    pairs = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=3)
    codes = ((nibbles | (pairs << 4)).astype(np.int8) - np.int8(32)).reshape(rows, blocks, 16, 16)
    scales = raw[:, :, 192:208].view(np.int8).astype(np.float32)
    return _groups(codes, _half(raw, 208)[..., None] * scales, None, 8)


# By GGML type number.
BLOCK_LAYOUTS = {
    0: BlockLayout("F32", 1, 4, None),
    1: BlockLayout("F16", 1, 2, None),
    2: BlockLayout("Q4_0", 32, 18, _q4_0),
    3: BlockLayout("Q4_1", 32, 20, _q4_1),
    6: BlockLayout("Q5_0", 32, 22, _q5_0),
    7: BlockLayout("Q5_1", 32, 24, _q5_1),
    8: BlockLayout("Q8_0", 32, 34, _q8_0),
    12: BlockLayout("Q4_K", 256, 144, _q4_k),
    13: BlockLayout("Q5_K", 256, 176, _q5_k),
    14: BlockLayout("Q6_K", 256, 210, _q6_k),
    30: BlockLayout("BF16", 1, 2, None),
}
