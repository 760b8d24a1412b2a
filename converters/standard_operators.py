"""The parts of a decoder in operators of ONNX itself: for TensorRT, which knows no others, and readable by any runtime.

Opset 17 (TensorRT 8.5) with plain weights, 21 (TensorRT 10) with 4-bit or 8-bit ones as DequantizeLinear. In float16 the matrices, the keys
and the values are rounded, while the residual sum, the norms, the rotation and the softmax stay float32: their range is what half precision
loses. Scores are computed over past and new keys apart, so that the past is read where it lies.
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
from converters.errors import ConversionError
from converters.onnx_graph import OPSET, OPSET_WITH_CODES, GraphWriter
from converters.quantised_blocks import Blocks, Float

# Names (fnmatch) of what a weakly typed builder must not round to float16.
KEEPS_FP32 = ("*norm*", "*residual*", "*softmax*", "rope.*", "*.rotated*")
_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class StandardForm:
    """`compute`: type of matrices, keys and values. `code_bits`: quantised weights of so many bits keep their codes."""

    compute: Literal["float32", "float16"] = "float16"
    code_bits: tuple[int, ...] = ()

    @property
    def opset(self) -> int:
        return OPSET_WITH_CODES if self.code_bits else OPSET


class StandardOperators:
    def __init__(self, graph: GraphWriter, decoder: Decoder, form: StandardForm) -> None:
        self._graph = graph
        self._decoder = decoder
        self._form = form
        self.number: np.dtype[Any] = np.dtype(form.compute)
        self._kind = TensorProto.FLOAT16 if form.compute == "float16" else TensorProto.FLOAT
        self._table = ""

    def open(self) -> None:
        """Inputs, outputs, and what all layers share: angles and masks."""
        graph, decoder = self._graph, self._decoder
        graph.input("input_ids", TensorProto.INT64, ["batch", "sequence"])
        graph.input("lengths", TensorProto.INT32, ["batch"])
        graph.input("logits_at", TensorProto.INT32, ["batch", "logits"])
        graph.output("logits", TensorProto.FLOAT, ["batch", "logits", decoder.vocabulary])
        for name in (f"{layer}.{part}" for layer in range(decoder.layers) for part in ("key", "value")):
            graph.input(f"past.{name}", self._kind, ["batch", "past", decoder.kv_heads, decoder.head_dim])
            graph.output(f"new.{name}", self._kind, ["batch", "sequence", decoder.kv_heads, decoder.head_dim])
        tokens = graph.constant("tokens", np.arange(decoder.context_tokens, dtype=np.int32))
        sequence = self._slice(tokens, "zero", self._size("input_ids", "sequence"), 0, "sequence.tokens")
        past = self._slice(tokens, "zero", self._size("past.0.key", "past"), 0, "past.tokens")
        lengths = graph.node("Unsqueeze", ["lengths", graph.integers("last_axis", -1)], "lengths.column")
        self._angles(graph.node("Add", [lengths, sequence], "positions.any"))
        held = graph.node("Less", [past, lengths], "past.held")
        graph.node("Unsqueeze", [held, graph.integers("axes.1_2", 1, 2)], "mask.past")
        # A row of scores for each token and each of the query heads that share a key head.
        group = np.zeros((1, decoder.heads // decoder.kv_heads), np.int32)
        column = graph.node("Unsqueeze", [sequence, graph.integers("last_axis", -1)], "sequence.column")
        rows = graph.node("Add", [column, graph.constant("group.zeros", group)], "sequence.group")
        rows = graph.node("Reshape", [rows, graph.integers("shape.column", -1, 1)], "sequence.rows")
        graph.node("Greater", [sequence, rows], "mask.later")

    def embedding(self, ids: str, matrix: Matrix, output: str) -> str:
        self._table = self._graph.constant("token_embd.values", self._plain(matrix, "token_embd.weight"))
        rows = self._graph.node("Gather", [self._table, ids], f"{output}.rows")
        return self._cast(rows, TensorProto.FLOAT, f"{output}.residual")

    def norm(self, value: str, weight: str, output: str) -> str:
        return self._cast(self._norm(value, weight, output), self._kind, f"{output}.rounded")

    def add_norm(self, value: str, residual: str, weight: str, output: str) -> tuple[str, str]:
        total = self._graph.node("Add", [self._cast(value, TensorProto.FLOAT, f"{output}.value"), residual], f"{output}.residual")
        return self.norm(total, weight, output), total

    def head_norm(self, value: str, weight: str, output: str) -> str:
        """The norm of each head on its own."""
        shape = self._graph.integers("shape.heads", 0, 0, -1, self._decoder.head_dim)
        heads = self._cast(self._graph.node("Reshape", [value, shape], f"{output}.heads"), TensorProto.FLOAT, f"{output}.float")
        normed = self._graph.node(
            "Reshape", [self._norm(heads, weight, output), self._graph.integers("shape.flat", 0, 0, -1)], f"{output}.flat"
        )
        return self._cast(normed, self._kind, f"{output}.rounded")

    def linear(self, value: str, matrices: Sequence[Matrix], name: str) -> str:
        """value @ concatenate(matrices).T"""
        if not any(self._keeps_codes(matrix) for matrix in matrices):
            merged = np.concatenate([self._plain(matrix, name) for matrix in matrices])
            return self._graph.node("MatMul", [value, self._graph.constant(f"{name}.weight", merged.T)], name)
        parts = [self._matrix(value, matrix, f"{name}.{index}" if len(matrices) > 1 else name) for index, matrix in enumerate(matrices)]
        return parts[0] if len(parts) == 1 else self._graph.node("Concat", parts, name, axis=-1)

    def bias(self, value: str, bias: Float, name: str) -> str:
        return self._graph.node("Add", [value, self._graph.constant(f"{name}.values", self._rounded(bias, name))], name)

    def gate(self, value: str, name: str) -> str:
        """silu(first half) * second half."""
        graph, inner = self._graph, self._decoder.feed_forward
        gate, up = self.split(value, [inner, inner], f"{name}.halves")
        silu = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
        return graph.node("Mul", [silu, up], name)

    def split(self, value: str, widths: Sequence[int], name: str) -> Sequence[str]:
        sizes = self._graph.integers("widths." + "_".join(map(str, widths)), *widths)
        return self._graph.nodes("Split", [value, sizes], [f"{name}.{index}" for index in range(len(widths))], axis=-1)

    def attention(self, query: str, key: str, value: str, layer: int, output: str) -> str:
        """RoPE and attention over past and new; writes `new.{layer}.*`. With key and value empty, query holds all three."""
        graph, decoder = self._graph, self._decoder
        if not key:
            keys = decoder.kv_heads * decoder.head_dim
            query, key, value = self.split(query, [decoder.heads * decoder.head_dim, keys, keys], f"{output}.qkv")
        key = self._rotated(key, decoder.kv_heads, f"{output}.key", f"new.{layer}.key")
        value = graph.node("Reshape", [value, self._heads_shape(decoder.kv_heads)], f"new.{layer}.value")
        query = self._grouped(self._rotated(query, decoder.heads, f"{output}.query", ""), output)
        past_key, past_value = f"past.{layer}.key", f"past.{layer}.value"
        low = graph.constant("mask.low", np.array(np.finfo(self.number).min, self.number))
        past_scores = graph.node("MatMul", [query, self._turned(past_key, [0, 2, 3, 1])], f"{output}.past_scores")
        past_scores = graph.node("Where", ["mask.past", past_scores, low], f"{output}.past_scores.masked")
        new_scores = graph.node("MatMul", [query, self._turned(key, [0, 2, 3, 1])], f"{output}.new_scores")
        new_scores = graph.node("Where", ["mask.later", low, new_scores], f"{output}.new_scores.masked")
        scores = graph.node("Concat", [past_scores, new_scores], f"{output}.scores", axis=-1)
        scores = self._cast(scores, TensorProto.FLOAT, f"{output}.scores.float")
        shares = self._cast(graph.node("Softmax", [scores], f"{output}.softmax", axis=-1), self._kind, f"{output}.shares")
        past_shares = self._slice(shares, "zero", "past.size", 3, f"{output}.past_shares")
        new_shares = self._slice(shares, "past.size", graph.integers("end", _END), 3, f"{output}.new_shares")
        past = graph.node("MatMul", [past_shares, self._turned(past_value, [0, 2, 1, 3])], f"{output}.past")
        new = graph.node("MatMul", [new_shares, self._turned(value, [0, 2, 1, 3])], f"{output}.new")
        both = graph.node("Add", [past, new], f"{output}.both")
        group = decoder.heads // decoder.kv_heads
        both = graph.node("Reshape", [both, graph.integers("shape.ungroup", 0, 0, -1, group, decoder.head_dim)], f"{output}.groups")
        return graph.node("Reshape", [self._turned(both, [0, 2, 1, 3, 4]), graph.integers("shape.flat", 0, 0, -1)], output)

    def wanted(self, value: str) -> str:
        graph = self._graph
        places = graph.node("Cast", ["logits_at"], "head.at", to=TensorProto.INT64)
        places = graph.node("Unsqueeze", [places, graph.integers("last_axis", -1)], "head.places")
        return graph.node("GatherND", [value, places], "head.input", batch_dims=1)

    def head(self, value: str, matrix: Matrix) -> None:
        if self._decoder.tied_head and not self._keeps_codes(matrix):
            logits = self._graph.node("MatMul", [value, self._turned(self._table, [1, 0])], self._half("logits"))
        else:
            logits = self.linear(value, [matrix], self._half("logits"))
        self._cast(logits, TensorProto.FLOAT, "logits")

    def _angles(self, positions: str) -> None:
        graph = self._graph
        # Rows that are filled up may reach over the tables; nobody reads what comes of that.
        last = graph.constant("positions.last", np.array(self._decoder.context_tokens - 1, np.int32))
        positions = graph.node("Min", [positions, last], "positions")
        for name, table in zip(("rope.cos", "rope.sin"), rope_tables(self._decoder), strict=True):
            rows = graph.node("Gather", [graph.constant(f"{name}.table", table), positions], f"{name}.rows")
            graph.node("Unsqueeze", [rows, graph.integers("axis.2", 2)], name)

    def _rotated(self, value: str, heads: int, name: str, output: str) -> str:
        """[batch, sequence, heads, head_dim] turned by position; queries are scaled on the way, before they are rounded."""
        graph, half = self._graph, self._decoder.head_dim // 2
        value = self._cast(graph.node("Reshape", [value, self._heads_shape(heads)], f"{name}.heads"), TensorProto.FLOAT, f"{name}.float")
        if not output:
            scale = graph.constant("attention.scale", np.array(self._decoder.head_dim**-0.5, np.float32))
            value = graph.node("Mul", [value, scale], f"{name}.scaled")
        first, second = self.split(value, [half, half], f"{name}.halves")
        turned = [
            graph.node(operator, [self._times(one, "rope.cos"), self._times(other, "rope.sin")], f"{name}.rotated.{index}")
            for index, (operator, one, other) in enumerate((("Sub", first, second), ("Add", second, first)))
        ]
        rotated = output or f"{name}.turned"
        if self.number == np.float32:
            return graph.node("Concat", turned, rotated, axis=-1)
        return graph.node("Cast", [graph.node("Concat", turned, f"{name}.rotated", axis=-1)], rotated, to=self._kind)

    def _grouped(self, query: str, output: str) -> str:
        """[batch, kv_heads, sequence * group, head_dim]: the query heads of one key head are rows of one product."""
        graph, decoder = self._graph, self._decoder
        shape = graph.integers("shape.group", 0, 0, decoder.kv_heads, decoder.heads // decoder.kv_heads, decoder.head_dim)
        groups = self._turned(graph.node("Reshape", [query, shape], f"{output}.query.groups"), [0, 2, 1, 3, 4])
        return graph.node("Reshape", [groups, graph.integers("shape.rows", 0, 0, -1, decoder.head_dim)], f"{output}.query.rows")

    def _norm(self, value: str, weight: str, output: str) -> str:
        graph = self._graph
        square = graph.node("Mul", [value, value], f"{output}.square")
        if graph.opset < 18:
            mean = graph.node("ReduceMean", [square], f"{output}.mean", axes=[-1], keepdims=1)
        else:
            mean = graph.node("ReduceMean", [square, graph.integers("last_axis", -1)], f"{output}.mean", keepdims=1)
        epsilon = graph.constant("norm.epsilon", np.array(self._decoder.rms_epsilon, np.float32))
        root = graph.node("Sqrt", [graph.node("Add", [mean, epsilon], f"{output}.shifted")], f"{output}.root")
        return graph.node("Mul", [graph.node("Div", [value, root], f"{output}.divided"), weight], output)

    def _keeps_codes(self, matrix: Matrix) -> bool:
        return isinstance(matrix, Blocks) and matrix.bits in self._form.code_bits

    def _matrix(self, value: str, matrix: Matrix, name: str) -> str:
        graph = self._graph
        if not isinstance(matrix, Blocks) or not self._keeps_codes(matrix):
            return graph.node("MatMul", [value, graph.constant(f"{name}.weight", self._plain(matrix, name).T)], name)
        rows, blocks, width = matrix.codes.shape
        if matrix.bits == 4:
            halves = matrix.codes.view(np.uint8) & np.uint8(15)
            codes = graph.packed(f"{name}.codes", halves[..., 0::2] | (halves[..., 1::2] << np.uint8(4)), (rows, blocks * width))
        else:
            codes = graph.constant(f"{name}.codes", matrix.codes.reshape(rows, blocks * width))
        scale = graph.constant(f"{name}.scale", self._rounded(matrix.scale, name))
        weight = self._turned(graph.node("DequantizeLinear", [codes, scale], f"{name}.weight", axis=1, block_size=width), [1, 0])
        if matrix.offset is None:
            return graph.node("MatMul", [value, weight], name)
        # The offsets of the blocks against the sums of what they are multiplied with.
        folded = graph.node("Reshape", [value, graph.integers(f"shape.{blocks}x{width}", 0, 0, blocks, width)], f"{name}.blocks")
        sums = graph.node("ReduceSum", [folded, graph.integers("last_axis", -1)], f"{name}.sums", keepdims=0)
        shift = graph.node("MatMul", [sums, graph.constant(f"{name}.offset", self._rounded(matrix.offset.T, name))], f"{name}.shift")
        return graph.node("Add", [graph.node("MatMul", [value, weight], f"{name}.scaled"), shift], name)

    def _plain(self, matrix: Matrix, name: str) -> NDArray[Any]:
        return self._rounded(matrix.float32() if isinstance(matrix, Blocks) else matrix, name)

    def _rounded(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        with np.errstate(over="ignore"):
            rounded = values.astype(self.number)
        if self.number == np.float16 and not np.isfinite(rounded).all():
            raise ConversionError(f"{name} has weights that are larger than float16 can hold (65504); build it in fp32", "unsupported")
        return rounded

    def _cast(self, value: str, kind: int, output: str) -> str:
        """`value` in another type, where types differ at all."""
        return value if self.number == np.float32 else self._graph.node("Cast", [value], output, to=kind)

    def _half(self, name: str) -> str:
        return name if self.number == np.float32 else f"{name}.half"

    def _times(self, value: str, angle: str) -> str:
        return self._graph.node("Mul", [value, angle], f"{value}.{angle}.rotated")

    def _turned(self, value: str, order: Sequence[int]) -> str:
        return self._graph.node("Transpose", [value], f"{value}.turned.{''.join(map(str, order))}", perm=list(order))

    def _heads_shape(self, heads: int) -> str:
        return self._graph.integers(f"shape.heads.{heads}", 0, 0, heads, self._decoder.head_dim)

    def _size(self, value: str, name: str) -> str:
        """Length of the second axis, as [1] int64. The attributes of `Shape` are newer than some parsers."""
        shape = self._graph.node("Shape", [value], f"{name}.shape")
        return self._graph.node("Gather", [shape, self._graph.integers("one", 1)], f"{name}.size")

    def _slice(self, value: str, start: str, end: str, axis: int, output: str) -> str:
        start = self._graph.integers("zero", 0) if start == "zero" else start
        return self._graph.node("Slice", [value, start, end, self._graph.integers(f"axis.{axis}", axis)], output)
