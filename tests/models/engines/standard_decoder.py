"""A decoder of two small layers in the standard form that our converters write for TensorRT: random weights, generation.json beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from converters.decoder import Decoder
from converters.decoder_graph import write_decoder_graph
from converters.decoder_profiles import decoder_profiles
from converters.quantised_blocks import Float
from converters.standard_operators import StandardForm
from tests.models.engines.fake_tensorrt import write_plan
from tests.models.engines.tiny_decoder import CONTEXT, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCABULARY

INNER = 96
DECODER = Decoder(
    architecture="llama", layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, hidden=HIDDEN, feed_forward=INNER,
    vocabulary=VOCABULARY, context_tokens=CONTEXT, rms_epsilon=1e-5, rope_base=10000.0,
    rope_factors=np.ones(HEAD_DIM // 2, np.float32), tied_head=False, normalises_heads=False, has_interleaved_rows=False,
)  # fmt: skip


class RandomWeights:
    """Implements DecoderSource."""

    path = Path("random")

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        keys = KV_HEADS * HEAD_DIM
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN), "output.weight": (VOCABULARY, HIDDEN)}
        for block in (f"blk.{layer}." for layer in range(LAYERS)):
            shapes |= {f"{block}attn_q.weight": (HIDDEN, HIDDEN), f"{block}attn_k.weight": (keys, HIDDEN)}
            shapes |= {f"{block}attn_v.weight": (keys, HIDDEN), f"{block}attn_output.weight": (HIDDEN, HIDDEN)}
            shapes |= {f"{block}ffn_gate.weight": (INNER, HIDDEN), f"{block}ffn_up.weight": (INNER, HIDDEN)}
            shapes |= {f"{block}ffn_down.weight": (HIDDEN, INNER)}
        self.tensors: dict[str, Any] = {name: (random.standard_normal(shape) * 0.15).astype(np.float32) for name, shape in shapes.items()}
        self.tensors["token_embd.weight"] *= 6
        for name in ("output_norm.weight", *(f"blk.{layer}.{part}_norm.weight" for layer in range(LAYERS) for part in ("attn", "ffn"))):
            self.tensors[name] = np.ones(HIDDEN, np.float32)

    def shape(self, name: str) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.tensors[name].shape
        return shape

    def format(self, name: str) -> str:
        return "F32"

    def float32(self, name: str) -> Float:
        values: Float = self.tensors[name]
        return values

    def matrix(self, name: str) -> Float:
        return self.float32(name)


def write_standard_onnx(folder: Path, compute: Literal["float32", "float16"] = "float32", seed: int = 7) -> Path:
    """Write model.onnx (weights beside it) and generation.json; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_decoder_graph(RandomWeights(seed), DECODER, folder, StandardForm(compute), lambda fraction, message: None)
    facts = {name: getattr(DECODER, name) for name in ("layers", "heads", "kv_heads", "head_dim", "hidden", "vocabulary", "context_tokens")}
    (folder / "generation.json").write_text(json.dumps({**facts, "eos_ids": [2], "bos_id": 1}))
    return folder


def write_standard_plan(
    folder: Path, slots: int = 4, capacity: int = CONTEXT, chunk: int = 16, compute: Literal["float32", "float16"] = "float32", **facts: Any
) -> Path:
    """The same as model.plan for the fake TensorRT."""
    source = write_standard_onnx(folder / "onnx", compute)
    model = onnx.load(str(source / "model.onnx"))
    (folder / "generation.json").write_bytes((source / "generation.json").read_bytes())
    return write_plan(folder, model, decoder_profiles(DECODER, slots, capacity, chunk), **facts)
