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

from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnx import TensorProto

from converters.decoder import Decoder
from converters.gguf import GgufFile
from converters.onnx_graph import GraphWriter
from converters.onnxruntime_operators import Activations, Matrix, OnnxRuntimeOperators
from converters.quantised_blocks import Blocks, Float

Progress = Callable[[float, str], None]


def write_decoder_graph(gguf: GgufFile, decoder: Decoder, folder: Path, activations: Activations, progress: Progress) -> Path:
    """Write `model.onnx` and `model.onnx.data` into `folder`; returns the path of the first."""
    with GraphWriter(folder) as graph:
        build = _DecoderGraph(gguf, decoder, graph, OnnxRuntimeOperators(graph, decoder, activations))
        build.inputs()
        residual = build.embedding()
        value = build.first_norm(residual)
        for layer in range(decoder.layers):
            progress(layer / decoder.layers, f"layer {layer + 1} of {decoder.layers}")
            value, residual = build.block(value, residual, layer)
        build.head(value)
        properties = {"architecture": decoder.architecture, "activations": activations, "context_tokens": str(decoder.context_tokens)}
        return graph.save(f"{decoder.architecture} decoder", properties)


class _DecoderGraph:
    def __init__(self, gguf: GgufFile, decoder: Decoder, graph: GraphWriter, operators: OnnxRuntimeOperators) -> None:
        self._gguf = gguf
        self._decoder = decoder
        self._graph = graph
        self._operators = operators

    def inputs(self) -> None:
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

    def embedding(self) -> str:
        return self._operators.embedding("input_ids", self._matrix("token_embd.weight"), "embedding")

    def first_norm(self, value: str) -> str:
        return self._operators.norm(value, self._vector("blk.0.attn_norm.weight"), "blk.0.attn_norm")

    def block(self, value: str, residual: str, layer: int) -> tuple[str, str]:
        """From the normed input and its residual to those of the next block."""
        operators, block = self._operators, f"blk.{layer}."
        attended = operators.linear(self._attention(value, layer), [self._matrix(f"{block}attn_output.weight")], f"{block}attn_output")
        value, residual = operators.add_norm(attended, residual, self._vector(f"{block}ffn_norm.weight"), f"{block}ffn_norm")
        inner = [self._matrix(f"{block}ffn_gate.weight"), self._matrix(f"{block}ffn_up.weight")]
        gated = operators.gate(operators.linear(value, inner, f"{block}ffn_gate_up"), f"{block}ffn_gate")
        down = operators.linear(gated, [self._matrix(f"{block}ffn_down.weight")], f"{block}ffn_down")
        if layer + 1 < self._decoder.layers:
            weight = self._vector(f"blk.{layer + 1}.attn_norm.weight")
            return operators.add_norm(down, residual, weight, f"blk.{layer + 1}.attn_norm")
        return operators.add_norm(down, residual, self._vector("output_norm.weight"), "output_norm")

    def head(self, value: str) -> None:
        graph = self._graph
        length = graph.node("Shape", [value], "head.length", start=1, end=2)
        start = graph.node("Sub", [length, "num_logits"], "head.start")
        end, axis = graph.integers("head.end", np.iinfo(np.int64).max), graph.integers("head.axis", 1)
        last = graph.node("Slice", [value, start, end, axis], "head.input")
        name = "token_embd.weight" if self._decoder.tied_head else "output.weight"
        self._operators.linear(last, [self._matrix(name)], "logits")

    def _attention(self, value: str, layer: int) -> str:
        operators, decoder, block = self._operators, self._decoder, f"blk.{layer}."
        parts = [self._matrix(f"{block}attn_{part}.weight", self._head_count(part)) for part in "qkv"]
        packed = operators.linear(value, parts, f"{block}attn_qkv")
        biases = [self._bias(f"{block}attn_{part}.bias", part) for part in "qkv"]
        if any(np.any(bias) for bias in biases):
            packed = operators.bias(packed, np.concatenate(biases), f"{block}attn_qkv.bias")
        if not decoder.normalises_heads:
            return operators.attention(packed, "", "", layer, f"{block}attention")
        keys = decoder.kv_heads * decoder.head_dim
        query, key, values = operators.split(packed, [decoder.heads * decoder.head_dim, keys, keys], f"{block}attn_split")
        query = operators.head_norm(query, self._vector(f"{block}attn_q_norm.weight"), f"{block}attn_q_norm")
        key = operators.head_norm(key, self._vector(f"{block}attn_k_norm.weight"), f"{block}attn_k_norm")
        return operators.attention(query, key, values, layer, f"{block}attention")

    def _head_count(self, part: str) -> int:
        """Heads whose rows have to be put back in order; 0 where they are in order."""
        if part == "v" or not self._decoder.has_interleaved_rows:
            return 0
        return self._decoder.heads if part == "q" else self._decoder.kv_heads

    def _bias(self, name: str, part: str) -> Float:
        if name not in self._gguf.tensors:
            heads = self._decoder.heads if part == "q" else self._decoder.kv_heads
            return np.zeros(heads * self._decoder.head_dim, np.float32)
        bias = self._gguf.float32(name)
        heads = self._head_count(part)
        return bias[_row_order(len(bias), heads)] if heads else bias

    def _vector(self, name: str) -> str:
        return self._graph.constant(name, self._gguf.float32(name))

    def _matrix(self, name: str, interleaved_heads: int = 0) -> Matrix:
        """A weight as stored: blocks where quantised, else float16 or float32 [rows, columns]."""
        tensor = self._gguf.tensor(name)
        raw = self._gguf.raw(name)
        if interleaved_heads:
            raw = raw[_row_order(raw.shape[0], interleaved_heads)]
        if tensor.layout.unpack is not None:
            blocks: Blocks = tensor.layout.unpack(raw)
            return blocks
        if tensor.layout.name == "F16":
            return np.ascontiguousarray(raw).reshape(raw.shape[0], -1).view("<f2")
        return tensor.layout.dequantise(np.ascontiguousarray(raw))


def _row_order(rows: int, heads: int) -> list[int]:
    """Where each row of the published order lies in llama.cpp's: there a head's two RoPE halves are interleaved."""
    order: list[int] = np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1).tolist()
    return order
