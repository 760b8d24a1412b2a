"""A decoder of two small layers in the form our converters write: random weights, real GroupQueryAttention, generation.json beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper, save_model

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, CONTEXT = 2, 4, 2, 16, 97, 256
HIDDEN = HEADS * HEAD_DIM


def write_tiny_decoder(folder: Path, seed: int = 7) -> Path:
    """Write model.onnx and generation.json into `folder`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    graph = _Graph(np.random.default_rng(seed))
    hidden = graph.node("Gather", [graph.weight("embedding", (VOCABULARY, HIDDEN), 1.0), "input_ids"])
    angles = np.arange(CONTEXT)[:, None] * (10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))[None]
    cosine, sine = graph.constant("cosine", np.cos(angles).astype(np.float32)), graph.constant("sine", np.sin(angles).astype(np.float32))
    for layer in range(LAYERS):
        hidden = graph.layer(layer, hidden, cosine, sine)
    start = graph.node("Reshape", [graph.node("Neg", ["num_logits"]), "one_long"])
    last = graph.node("Slice", [graph.norm("final", hidden), start, "end", "axis"])
    graph.nodes.append(helper.make_node("MatMul", [last, graph.weight("head", (HIDDEN, VOCABULARY), 0.3)], ["logits"]))
    save_model(graph.model(), str(folder / "model.onnx"))
    facts = {
        "layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "hidden": HIDDEN, "vocabulary": VOCABULARY,
        "context_tokens": CONTEXT, "eos_ids": [2], "bos_id": 1, "add_bos": False, "note": "of the converter",
    }  # fmt: skip
    (folder / "generation.json").write_text(json.dumps(facts))
    return folder


class _Graph:
    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.constant("one_long", np.array([1], np.int64))
        self.constant("end", np.array([np.iinfo(np.int64).max], np.int64))
        self.constant("axis", np.array([1], np.int64))

    def constant(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, shape: Any, scale: float) -> str:
        return self.constant(name, (self.random.standard_normal(shape) * scale).astype(np.float32))

    def node(self, kind: str, inputs: list[str]) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name))
        return name

    def norm(self, name: str, value: str) -> str:
        ones, zeros = np.ones(HIDDEN, np.float32), np.zeros(HIDDEN, np.float32)
        return self.node("LayerNormalization", [value, self.constant(f"{name}.scale", ones), self.constant(f"{name}.bias", zeros)])

    def layer(self, layer: int, hidden: str, cosine: str, sine: str) -> str:
        normed = self.norm(f"{layer}.attention", hidden)
        widths = {"query": HIDDEN, "key": KV_HEADS * HEAD_DIM, "value": KV_HEADS * HEAD_DIM}
        parts = [self.node("MatMul", [normed, self.weight(f"{layer}.{part}", (HIDDEN, width), 0.15)]) for part, width in widths.items()]
        pasts = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        attended = f"attended_{layer}"
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [*parts, *pasts, "seqlens_k", "total_sequence_length", cosine, sine],
                [attended, *(f"present.{layer}.{part}" for part in ("key", "value"))],
                name=attended,
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                do_rotary=1,
            )
        )
        hidden = self.node("Add", [hidden, self.node("MatMul", [attended, self.weight(f"{layer}.output", (HIDDEN, HIDDEN), 0.15)])])
        normed = self.norm(f"{layer}.mlp", hidden)
        wide = self.node("Relu", [self.node("MatMul", [normed, self.weight(f"{layer}.up", (HIDDEN, 2 * HIDDEN), 0.15)])])
        return self.node("Add", [hidden, self.node("MatMul", [wide, self.weight(f"{layer}.down", (2 * HIDDEN, HIDDEN), 0.15)])])

    def model(self) -> Any:
        cache: list[str | int | None] = ["batch", KV_HEADS, "capacity", HEAD_DIM]
        names = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["batch"]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
            helper.make_tensor_value_info("num_logits", TensorProto.INT64, []),
            *(helper.make_tensor_value_info(f"past_key_values.{name}", TensorProto.FLOAT, cache) for name in names),
        ]
        outputs = [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "num_logits", VOCABULARY]),
            *(helper.make_tensor_value_info(f"present.{name}", TensorProto.FLOAT, cache) for name in names),
        ]
        graph = helper.make_graph(self.nodes, "tiny", inputs, outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])
        model.ir_version = 8
        checker.check_model(model)
        return model
