"""The parts of a decoder in ONNX Runtime's own operators (domain com.microsoft).

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from converters.decoder import Decoder, rope_tables
from converters.decoder_source import Matrix
from converters.onnx_graph import MICROSOFT, OPSET, GraphWriter
from converters.quantised_blocks import Blocks, Float

Activations = Literal["float32", "int8"]
# MatMulNBits' accuracy_level: 1 computes in float32, 4 quantises the activations to int8 per block.
ACCURACY_LEVEL = {"float32": 1, "int8": 4}


@dataclass(frozen=True)
class OnnxRuntimeForm:
    """`activations`: float32 computes with the exact values of quantised weights, int8 also rounds what they are multiplied with."""

    activations: Activations = "float32"
    opset: int = OPSET


class OnnxRuntimeOperators:
    number: np.dtype[Any] = np.dtype(np.float32)

    def __init__(self, graph: GraphWriter, decoder: Decoder, activations: Activations) -> None:
        self._graph = graph
        self._decoder = decoder
        self._activations = activations
        self._cos, self._sin = rope_tables(decoder)

    def open(self) -> None:
        graph, decoder = self._graph, self._decoder
        graph.input("input_ids", TensorProto.INT64, ["batch", "sequence"])
        graph.input("seqlens_k", TensorProto.INT32, ["batch"])
        graph.input("total_sequence_length", TensorProto.INT32, [])
        graph.input("num_logits", TensorProto.INT64, [])
        graph.output("logits", TensorProto.FLOAT, ["batch", "num_logits", decoder.vocabulary])
        shape: list[str | int] = ["batch", decoder.kv_heads, "capacity", decoder.head_dim]
        for layer in range(decoder.layers):
            for part in ("key", "value"):
                graph.input(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, shape)
                graph.output(f"present.{layer}.{part}", TensorProto.FLOAT, shape)

    def embedding(self, ids: str, matrix: Matrix, output: str) -> str:
        """Rows of `matrix` [vocabulary, hidden] for ids [batch, sequence], dequantised after the gather."""
        graph = self._graph
        if not isinstance(matrix, Blocks):
            rows = graph.node("Gather", [graph.constant("token_embd.values", matrix), ids], f"{output}.rows")
            return graph.node("Cast", [rows], output, to=TensorProto.FLOAT)
        codes = graph.node("Gather", [graph.constant("token_embd.codes", matrix.codes), ids], f"{output}.codes")
        scale = graph.node("Gather", [graph.constant("token_embd.scale", matrix.scale[:, :, None]), ids], f"{output}.scale")
        value = graph.node("Mul", [graph.node("Cast", [codes], f"{output}.float", to=TensorProto.FLOAT), scale], f"{output}.scaled")
        if matrix.offset is not None:
            offset = graph.node("Gather", [graph.constant("token_embd.offset", matrix.offset[:, :, None]), ids], f"{output}.offset")
            value = graph.node("Add", [value, offset], f"{output}.shifted")
        return graph.node("Reshape", [value, graph.integers("shape.flat", 0, 0, -1)], output)

    def norm(self, value: str, weight: str, output: str) -> str:
        return self._graph.node("SimplifiedLayerNormalization", [value, weight], output, axis=-1, epsilon=self._decoder.rms_epsilon)

    def add_norm(self, value: str, residual: str, weight: str, output: str) -> tuple[str, str]:
        """The norm of value + residual, and the sum itself."""
        names = [output, "", "", f"{output}.sum"]
        self._graph.nodes(
            "SkipSimplifiedLayerNormalization", [value, residual, weight], names, MICROSOFT, epsilon=self._decoder.rms_epsilon
        )
        return names[0], names[3]

    def head_norm(self, value: str, weight: str, output: str) -> str:
        """The norm of each head on its own."""
        graph = self._graph
        shape = graph.integers("shape.heads", 0, 0, -1, self._decoder.head_dim)
        heads = graph.node("Reshape", [value, shape], f"{output}.heads")
        return graph.node("Reshape", [self.norm(heads, weight, f"{output}.normed"), graph.integers("shape.flat", 0, 0, -1)], output)

    def linear(self, value: str, matrices: Sequence[Matrix], name: str) -> str:
        """value @ concatenate(matrices).T: one multiplication where the matrices are stored alike, else one each."""
        merged = _merged(matrices)
        if merged is not None:
            return self._matrix(value, merged, name)
        parts = [self._matrix(value, matrix, f"{name}.{index}") for index, matrix in enumerate(matrices)]
        return self._graph.node("Concat", parts, name, axis=-1)

    def bias(self, value: str, bias: Float, name: str) -> str:
        return self._graph.node("Add", [value, self._graph.constant(f"{name}.values", bias)], name)

    def gate(self, value: str, name: str) -> str:
        """silu(first half) * second half."""
        graph = self._graph
        gate, up = graph.nodes("Split", [value], [f"{name}.gate", f"{name}.up"], axis=-1)
        return graph.node("Mul", [graph.node("QuickGelu", [gate], f"{name}.silu", MICROSOFT, alpha=1.0), up], name)

    def split(self, value: str, widths: Sequence[int], name: str) -> Sequence[str]:
        sizes = self._graph.integers("widths." + "_".join(map(str, widths)), *widths)
        return self._graph.nodes("Split", [value, sizes], [f"{name}.{index}" for index in range(len(widths))], axis=-1)

    def attention(self, query: str, key: str, value: str, layer: int, output: str) -> str:
        """RoPE, attention over past and present, both written to `present.{layer}.*`. With key and value empty, query holds all three."""
        graph, decoder = self._graph, self._decoder
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        tables = [graph.constant("rope.cos", self._cos), graph.constant("rope.sin", self._sin)]
        graph.nodes(
            "GroupQueryAttention",
            [query, key, value, *past, "seqlens_k", "total_sequence_length", *tables],
            [output, f"present.{layer}.key", f"present.{layer}.value"],
            MICROSOFT,
            num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads,
            scale=float(decoder.head_dim**-0.5),
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=-1,
        )
        return output

    def wanted(self, value: str) -> str:
        graph = self._graph
        length = graph.node("Shape", [value], "head.length", start=1, end=2)
        start = graph.node("Sub", [length, "num_logits"], "head.start")
        end, axis = graph.integers("head.end", np.iinfo(np.int64).max), graph.integers("head.axis", 1)
        return graph.node("Slice", [value, start, end, axis], "head.input")

    def head(self, value: str, matrix: Matrix) -> None:
        self.linear(value, [matrix], "logits")

    def _matrix(self, value: str, matrix: Matrix, name: str) -> str:
        graph = self._graph
        if not isinstance(matrix, Blocks):
            weight = graph.constant(f"{name}.weight", matrix.T)
            if matrix.dtype == np.float16:
                # Folded when the model is loaded; half the size on disk.
                weight = graph.node("Cast", [weight], f"{name}.weight.float", to=TensorProto.FLOAT)
            return graph.node("MatMul", [value, weight], name)
        if matrix.offset is None:
            return self._codes(value, matrix, name)
        blocks, width = matrix.codes.shape[1:]
        folded = graph.node("Reshape", [value, graph.integers(f"shape.{blocks}x{width}", 0, 0, blocks, width)], f"{name}.blocks")
        sums = graph.node("ReduceSum", [folded, graph.integers("last_axis", -1)], f"{name}.sums", keepdims=0)
        shift = graph.node("MatMul", [sums, graph.constant(f"{name}.offset", matrix.offset.T)], f"{name}.shift")
        return graph.node("Add", [self._codes(value, matrix, f"{name}.scaled"), shift], name)

    def _codes(self, value: str, matrix: Blocks, name: str) -> str:
        """value @ (scale * codes).T"""
        graph = self._graph
        rows, blocks, width = matrix.codes.shape
        bits, columns, scale = matrix.bits, blocks * width, matrix.scale
        inputs = [value]
        if bits == 4:
            inputs.append(graph.constant(f"{name}.codes", _packed(matrix.codes.view(np.uint8) + np.uint8(8))))
        elif self._activations == "int8":
            inputs.append(graph.constant(f"{name}.codes", matrix.codes.view(np.uint8) ^ np.uint8(128)))
        else:
            # 8-bit codes have no fast float32 kernel (35 times slower than 4-bit ones), so c = 16 * (c >> 4) + (c & 15): two runs of
            # 4-bit codes side by side, over the input repeated.
            bits, columns = 4, 2 * columns
            scale = np.concatenate([16 * scale, scale], axis=1)
            halves = np.concatenate([(matrix.codes >> 4).view(np.uint8) + np.uint8(8), matrix.codes.view(np.uint8) & 15], axis=1)
            zeros = np.repeat(np.array([8, 0], np.uint8), blocks)
            inputs[0] = graph.node("Concat", [value, value], f"{name}.twice", axis=-1)
            inputs.append(graph.constant(f"{name}.codes", _packed(halves)))
        inputs.append(graph.constant(f"{name}.scale", scale.reshape(-1)))
        if columns != blocks * width:
            inputs.append(graph.constant(f"{name}.zeros", np.tile(_packed(zeros), rows)))
        return graph.node(
            "MatMulNBits",
            inputs,
            name,
            MICROSOFT,
            K=columns,
            N=rows,
            bits=bits,
            block_size=width,
            accuracy_level=ACCURACY_LEVEL[self._activations],
        )


def _packed(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two 4-bit codes to a byte along the last axis, the first in the low half."""
    packed: NDArray[np.uint8] = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return packed


def _merged(matrices: Sequence[Matrix]) -> Matrix | None:
    """One matrix with the rows of all, or None where they are not stored alike."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if isinstance(first, Blocks):
        others = [matrix for matrix in matrices if isinstance(matrix, Blocks)]
        kinds = {(matrix.bits, matrix.width, matrix.offset is None) for matrix in others}
        if len(others) < len(matrices) or len(kinds) > 1:
            return None
        offsets = [matrix.offset for matrix in others if matrix.offset is not None]
        return Blocks(
            np.concatenate([matrix.codes for matrix in others]),
            np.concatenate([matrix.scale for matrix in others]),
            np.concatenate(offsets) if offsets else None,
            first.bits,
        )
    plain = [matrix for matrix in matrices if not isinstance(matrix, Blocks) and matrix.dtype == first.dtype]
    if len(plain) < len(matrices):
        return None
    merged: NDArray[np.float32] = np.concatenate(plain)
    return merged
