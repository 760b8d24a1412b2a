"""Plain weights as blocks of small integers, rounded to the nearest at conversion; the gate compares the result with the plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from converters.decoder_source import DecoderSource, Matrix
from converters.quantised_blocks import Blocks, Float

WIDTH = 32
# What all tokens pass through loses most by four bits, so it gets eight, as in llama.cpp's mixtures.
_EIGHT_BITS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class QuantisedSource:
    """`float32` gives the rounded weights, as everything else does; a reference takes the source itself."""

    source: DecoderSource
    bits: Literal[4, 8]

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self.source.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def format(self, name: str) -> str:
        bits = self._bits(name)
        return self.source.format(name) if bits is None else "Q8_0" if bits == 8 else "Q4_1"

    def float32(self, name: str) -> Float:
        bits = self._bits(name)
        return self.source.float32(name) if bits is None else self._blocks(name, bits).float32()

    def matrix(self, name: str) -> Matrix:
        bits = self._bits(name)
        return self.source.matrix(name) if bits is None else self._blocks(name, bits)

    def _blocks(self, name: str, bits: int) -> Blocks:
        return (eight_bits if bits == 8 else four_bits)(self.source.float32(name))

    def _bits(self, name: str) -> int | None:
        """None for what stays as it is: vectors, weights that are quantised already, and rows that blocks do not divide."""
        shape = self.source.shape(name)
        if len(shape) != 2 or shape[1] % WIDTH or self.source.format(name) not in ("F32", "F16", "BF16"):
            return None
        return 8 if name in _EIGHT_BITS else self.bits


def eight_bits(weight: Float) -> Blocks:
    """Symmetric, the scale of each block by its largest value: as ggml's Q8_0, but with a float32 scale."""
    blocks = weight.reshape(len(weight), -1, WIDTH)
    scale = np.abs(blocks).max(axis=-1) / np.float32(127)
    codes = np.rint(blocks / np.where(scale == 0, 1, scale)[..., None]).astype(np.int8)
    return Blocks(codes, scale, None, 8)


def four_bits(weight: Float) -> Blocks:
    """Sixteen steps from the least to the largest value of each block: as ggml's Q4_1, but with float32 scale and offset."""
    blocks = weight.reshape(len(weight), -1, WIDTH)
    least = blocks.min(axis=-1)
    scale = (blocks.max(axis=-1) - least) / np.float32(15)
    codes = np.rint((blocks - least[..., None]) / np.where(scale == 0, 1, scale)[..., None])
    return Blocks((np.clip(codes, 0, 15) - 8).astype(np.int8), scale, least + 8 * scale, 4)
