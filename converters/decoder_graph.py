"""The graph of a Llama-class decoder with its key-value cache as inputs and outputs, in one of two forms.

ONNX Runtime form (`onnxruntime_operators.py`)
    input_ids [batch, sequence] int64
    seqlens_k [batch] int32: valid tokens of each row after this step, less one
    total_sequence_length [] int32: the largest of those, not less one
    num_logits [] int64: logits are computed for so many last positions
    past_key_values.{i}.key, .value [batch, kv_heads, capacity, head_dim] float32
  → logits [batch, num_logits, vocabulary] float32
    present.{i}.key, .value, shaped as the past, so both may be bound to the same memory

Standard form (`standard_operators.py`): nothing but operators of ONNX itself, for TensorRT
    input_ids [batch, sequence] int64: tokens to append; rows shorter than the longest may be filled up behind with any token
    lengths [batch] int32: tokens that each row holds before this step
    logits_at [batch, logits] int32: positions of this step, 0..sequence-1, whose logits are wanted; sequence-1 is the last token
    past.{i}.key, .value [batch, past, kv_heads, head_dim]: token by token; `past` >= 1, >= every length, <= context_tokens.
        What lies at an index >= lengths[b] is masked but must be finite: zero the memory once when it is allocated
  → logits [batch, logits, vocabulary] float32
    new.{i}.key, .value [batch, sequence, kv_heads, head_dim]: of the appended tokens only, keys already rotated

  `past` is the same in all layers and may be the valid prefix or the whole capacity (fixed shapes, for CUDA graphs). With one row `new`
  may be bound right behind the valid tokens in the memory of `past`: new keys and values are never read through `past`, what is masked
  does not reach the result, and finite values stay finite while they are written. Past and new have the type the graph computes in:
  float32, or float16 in a graph of `precision` float16.

Either form may have one more input, when adapters were kept apart:
    adapter [batch] int64: 0 for the model itself, else the place of an adapter in `adapters` of generation.json, counted from 1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from converters.decoder import Decoder
from converters.decoder_source import DecoderSource, Matrix, interleaved_order, with_rows
from converters.lora import Adapter, stacked
from converters.onnx_graph import GraphWriter
from converters.onnxruntime_operators import OnnxRuntimeForm, OnnxRuntimeOperators
from converters.quantised_blocks import Float
from converters.standard_operators import StandardForm, StandardOperators

Progress = Callable[[float, str], None]
Form = OnnxRuntimeForm | StandardForm


class Operators(Protocol):
    """What a form writes for each part of a decoder. Values are names of tensors, [batch, sequence, width]."""

    @property
    def number(self) -> np.dtype[Any]:
        """Type of the values between the parts."""
        ...

    def open(self) -> None:
        """Declare inputs and outputs."""
        ...

    def embedding(self, ids: str, matrix: Matrix, output: str) -> str:
        """Rows of `matrix` [vocabulary, hidden]: the first residual."""
        ...

    def norm(self, value: str, weight: str, output: str) -> str: ...

    def add_norm(self, value: str, residual: str, weight: str, output: str) -> tuple[str, str]:
        """The norm of value + residual, and the sum itself."""
        ...

    def head_norm(self, value: str, weight: str, output: str) -> str: ...

    def linear(self, value: str, matrices: Sequence[Matrix], name: str) -> str: ...

    def bias(self, value: str, bias: Float, name: str) -> str: ...

    def gate(self, value: str, name: str) -> str: ...

    def split(self, value: str, widths: Sequence[int], name: str) -> Sequence[str]: ...

    def attention(self, query: str, key: str, value: str, layer: int, output: str) -> str: ...

    def wanted(self, value: str) -> str:
        """The positions whose logits are asked for."""
        ...

    def head(self, value: str, matrix: Matrix) -> None:
        """Write the output `logits`."""
        ...


def write_decoder_graph(
    source: DecoderSource, decoder: Decoder, folder: Path, form: Form, progress: Progress, adapters: Sequence[Adapter] = ()
) -> Path:
    """Write `model.onnx` and `model.onnx.data` into `folder`; returns the path of the first. `adapters` are kept apart, chosen per row."""
    with GraphWriter(folder, opset=form.opset) as graph:
        operators: Operators
        if isinstance(form, StandardForm):
            operators = StandardOperators(graph, decoder, form)
        else:
            operators = OnnxRuntimeOperators(graph, decoder, form.activations)
        build = _DecoderGraph(source, decoder, graph, operators, adapters)
        residual = build.open()
        value = build.first_norm(residual)
        for layer in range(decoder.layers):
            progress(layer / decoder.layers, f"layer {layer + 1} of {decoder.layers}")
            value, residual = build.block(value, residual, layer)
        build.head(value)
        properties = {"architecture": decoder.architecture, "form": repr(form), "context_tokens": str(decoder.context_tokens)}
        return graph.save(f"{decoder.architecture} decoder", properties)


class _DecoderGraph:
    def __init__(
        self, source: DecoderSource, decoder: Decoder, graph: GraphWriter, operators: Operators, adapters: Sequence[Adapter]
    ) -> None:
        self._source = source
        self._decoder = decoder
        self._graph = graph
        self._operators = operators
        self._adapters = adapters

    def open(self) -> str:
        self._operators.open()
        if self._adapters:
            self._graph.input("adapter", TensorProto.INT64, ["batch"])
        return self._operators.embedding("input_ids", self._matrix("token_embd.weight"), "embedding")

    def first_norm(self, value: str) -> str:
        return self._operators.norm(value, self._vector("blk.0.attn_norm.weight"), "blk.0.attn_norm")

    def block(self, value: str, residual: str, layer: int) -> tuple[str, str]:
        """From the normed input and its residual to those of the next block."""
        operators, block = self._operators, f"blk.{layer}."
        attended = self._linear(self._attention(value, layer), [f"{block}attn_output.weight"], f"{block}attn_output")
        value, residual = operators.add_norm(attended, residual, self._vector(f"{block}ffn_norm.weight"), f"{block}ffn_norm")
        inner = self._linear(value, [f"{block}ffn_gate.weight", f"{block}ffn_up.weight"], f"{block}ffn_gate_up")
        down = self._linear(operators.gate(inner, f"{block}ffn_gate"), [f"{block}ffn_down.weight"], f"{block}ffn_down")
        if layer + 1 < self._decoder.layers:
            weight = self._vector(f"blk.{layer + 1}.attn_norm.weight")
            return operators.add_norm(down, residual, weight, f"blk.{layer + 1}.attn_norm")
        return operators.add_norm(down, residual, self._vector("output_norm.weight"), "output_norm")

    def head(self, value: str) -> None:
        name = "token_embd.weight" if self._decoder.tied_head else "output.weight"
        self._operators.head(self._operators.wanted(value), self._matrix(name))

    def _attention(self, value: str, layer: int) -> str:
        operators, decoder, block = self._operators, self._decoder, f"blk.{layer}."
        packed = self._linear(value, [f"{block}attn_{part}.weight" for part in "qkv"], f"{block}attn_qkv")
        if any(f"{block}attn_{part}.bias" in self._source.tensors for part in "qkv"):
            bias = np.concatenate([self._bias(f"{block}attn_{part}.bias", part) for part in "qkv"])
            packed = operators.bias(packed, bias, f"{block}attn_qkv.bias")
        if not decoder.normalises_heads:
            return operators.attention(packed, "", "", layer, f"{block}attention")
        keys = decoder.kv_heads * decoder.head_dim
        query, key, values = operators.split(packed, [decoder.heads * decoder.head_dim, keys, keys], f"{block}attn_split")
        query = operators.head_norm(query, self._vector(f"{block}attn_q_norm.weight"), f"{block}attn_q_norm")
        key = operators.head_norm(key, self._vector(f"{block}attn_k_norm.weight"), f"{block}attn_k_norm")
        return operators.attention(query, key, values, layer, f"{block}attention")

    def _linear(self, value: str, names: Sequence[str], output: str) -> str:
        """One projection of several weights side by side, and what the adapters add to it."""
        product = self._operators.linear(value, [self._matrix(name) for name in names], output)
        widths = [self._source.shape(name)[0] for name in names]
        change = stacked(self._adapters, dict(zip(names, widths, strict=True)))
        if change is None:
            return product
        graph, number = self._graph, self._operators.number
        inner = graph.node("MatMul", [value, graph.constant(f"{output}.adapters.down", change.down.T.astype(number))], f"{output}.low")
        # A row of ones and zeros for each adapter lets through only what is its own.
        ranks = graph.constant(f"adapters.ranks.{'_'.join(map(str, change.ranks))}", change.choice().astype(number))
        chosen = graph.node(
            "Unsqueeze", [graph.node("Gather", [ranks, "adapter"], f"{output}.chosen"), graph.integers("axis.1", 1)], f"{output}.choice"
        )
        inner = graph.node("Mul", [inner, chosen], f"{output}.low.chosen")
        added = graph.node("MatMul", [inner, graph.constant(f"{output}.adapters.up", change.up.T.astype(number))], f"{output}.change")
        return graph.node("Add", [product, added], f"{output}.adapted")

    def _order(self, part: str, rows: int) -> NDArray[np.int64] | None:
        """How the rows of a part (`q`, `k`) have to be put in order; None where they are."""
        if part not in ("q", "k") or not self._decoder.has_interleaved_rows:
            return None
        return interleaved_order(rows, self._decoder.heads if part == "q" else self._decoder.kv_heads)

    def _bias(self, name: str, part: str) -> Float:
        heads = self._decoder.heads if part == "q" else self._decoder.kv_heads
        if name not in self._source.tensors:
            return np.zeros(heads * self._decoder.head_dim, np.float32)
        bias = self._source.float32(name)
        order = self._order(part, len(bias))
        return bias if order is None else bias[order]

    def _vector(self, name: str) -> str:
        return self._graph.constant(name, self._source.float32(name))

    def _matrix(self, name: str) -> Matrix:
        """A weight as stored, its rows in the published order."""
        matrix = self._source.matrix(name)
        order = self._order(name.split(".")[-2].removeprefix("attn_"), self._source.shape(name)[0])
        return matrix if order is None else with_rows(matrix, order)
