"""Small ONNX models for tests: a detector and an encoder with the shapes of real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

QUERIES, CLASSES, DIMENSIONS = 12, 3, 8


def detector(weight_scale: float = 0.02) -> Any:
    """pixel_values [N,3,32,48] → logits [N,12,3], pred_boxes [N,12,4]; each a matrix product with the flat picture."""
    rng = np.random.default_rng(3)
    pixels = 3 * 32 * 48
    weights = {
        "flat": np.array([0, -1], np.int64),
        "to_logits": (rng.standard_normal((pixels, QUERIES * CLASSES)) * weight_scale).astype(np.float32),
        "to_boxes": (rng.standard_normal((pixels, QUERIES * 4)) * 0.003).astype(np.float32),
        "logit_shape": np.array([0, QUERIES, CLASSES], np.int64),
        "box_shape": np.array([0, QUERIES, 4], np.int64),
    }
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "flat"], ["pixels"]),
        helper.make_node("MatMul", ["pixels", "to_logits"], ["flat_logits"]),
        helper.make_node("Reshape", ["flat_logits", "logit_shape"], ["logits"]),
        helper.make_node("MatMul", ["pixels", "to_boxes"], ["flat_boxes"]),
        helper.make_node("Sigmoid", ["flat_boxes"], ["shares"]),
        helper.make_node("Reshape", ["shares", "box_shape"], ["pred_boxes"]),
    ]
    return model(
        nodes,
        {"pixel_values": (TensorProto.FLOAT, ["N", 3, 32, 48])},
        {"logits": (TensorProto.FLOAT, ["N", QUERIES, CLASSES]), "pred_boxes": (TensorProto.FLOAT, ["N", QUERIES, 4])},
        weights,
    )


def encoder() -> Any:
    """input_ids [N,T] → last_hidden_state [N,T,8], looked up in a table; ids above the table wrap around."""
    table = np.random.default_rng(4).standard_normal((64, DIMENSIONS)).astype(np.float32)
    nodes = [
        helper.make_node("Mod", ["input_ids", "rows"], ["row"]),
        helper.make_node("Gather", ["table", "row"], ["last_hidden_state"]),
    ]
    return model(
        nodes,
        {"input_ids": (TensorProto.INT64, ["N", "T"])},
        {"last_hidden_state": (TensorProto.FLOAT, ["N", "T", DIMENSIONS])},
        {"table": table, "rows": np.array(64, np.int64)},
    )


def text_network(output: str, columns: int) -> Any:
    """input_ids [N,T] → `logits` [N,columns] of the mean of a normalised and transformed table's rows, or, before it is taken,
    `last_hidden_state` [N,T,columns]."""
    rng, width = np.random.default_rng(6), 32
    weights = {
        "table": rng.standard_normal((128, width)).astype(np.float32),
        "rows": np.array(128, np.int64),
        "norm.weight": (1 + 0.2 * rng.standard_normal(width)).astype(np.float32),
        "norm.bias": (0.2 * rng.standard_normal(width)).astype(np.float32),
        "up": (0.3 * rng.standard_normal((width, width))).astype(np.float32),
        "head": rng.standard_normal((width, columns)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Mod", ["input_ids", "rows"], ["row"]),
        helper.make_node("Gather", ["table", "row"], ["embedded"]),
        helper.make_node("LayerNormalization", ["embedded", "norm.weight", "norm.bias"], ["normed"], axis=-1),
        helper.make_node("MatMul", ["normed", "up"], ["raised"]),
        helper.make_node("Tanh", ["raised"], ["bent"]),
        helper.make_node("MatMul", ["bent", "head"], ["last_hidden_state"]),
    ]
    shape: list[Any] = ["N", "T", columns]
    if output == "logits":
        nodes.append(helper.make_node("ReduceMean", ["last_hidden_state"], ["logits"], axes=[1], keepdims=0))
        shape = ["N", columns]
    return model(nodes, {"input_ids": (TensorProto.INT64, ["N", "T"])}, {output: (TensorProto.FLOAT, shape)}, weights)


def model(
    nodes: list[Any], inputs: dict[str, tuple[int, list[Any]]], outputs: dict[str, tuple[int, list[Any]]], weights: dict[str, Any]
) -> Any:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save(path: Path, value: Any, external: str | None = None) -> Path:
    """Write a model; with `external`, its large weights into that file beside it."""
    if external is None:
        onnx.save(value, str(path))
    else:
        onnx.save(value, str(path), save_as_external_data=True, location=external, size_threshold=1024)
    return path
