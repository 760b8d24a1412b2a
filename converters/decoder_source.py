"""Where a decoder's weights come from: a GGUF file, or a folder with safetensors. Graph, reference and verification ask only this."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from converters.quantised_blocks import Blocks, Float

# [rows, columns] as stored: blocks where quantised, else plain numbers.
Matrix = Blocks | NDArray[np.float32] | NDArray[np.float16]


class DecoderSource(Protocol):
    """Weights under the names that GGUF gives them (`token_embd.weight`, `blk.0.attn_q.weight`), whatever the file calls them.

    The rows of `attn_q` and `attn_k` are in the file's order; `Decoder.has_interleaved_rows` says which. Methods raise ConversionError for
    a tensor that is not there or not readable.
    """

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, Any]:
        """All names; what stands behind them is the source's own."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def format(self, name: str) -> str:
        """How the weight is stored: `Q4_1`, `F16`, ..."""
        ...

    def float32(self, name: str) -> Float:
        """The weight as float32, in its own shape."""
        ...

    def matrix(self, name: str) -> Matrix:
        """The weight of two dimensions in the form in which it is stored."""
        ...


def interleaved_order(rows: int, heads: int) -> NDArray[np.int64]:
    """Where each row of the published order lies in llama.cpp's: there the two RoPE halves of a head are interleaved."""
    order: NDArray[np.int64] = np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
    return order


def with_rows(matrix: Matrix, order: NDArray[np.int64]) -> Matrix:
    """The matrix with its rows in another order."""
    if not isinstance(matrix, Blocks):
        return matrix[order]
    offset = None if matrix.offset is None else matrix.offset[order]
    return Blocks(matrix.codes[order], matrix.scale[order], offset, matrix.bits)
