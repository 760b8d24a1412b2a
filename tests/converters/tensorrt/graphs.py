"""Tiny ONNX graphs of the kinds that plans are built of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.converters.tiny_onnx import model, save

WIDTH, HEADS, CHANNELS = 64, 4, 16


def encoder(path: Path) -> Path:
    """input_ids, attention_mask [N,T] int64 → last_hidden_state [N,T,64]: embedding, one attention, LayerNormalization."""
    rng = np.random.default_rng(5)

    def weight(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 0.05).astype(np.float32)

    weights: dict[str, Any] = {
        "table": weight(100, WIDTH),
        **{f"to_{name}": weight(WIDTH, WIDTH) for name in ("query", "key", "value", "out")},
        "scale": np.ones(WIDTH, np.float32),
        "shift": np.zeros(WIDTH, np.float32),
        "split": np.array([0, 0, HEADS, WIDTH // HEADS], np.int64),
        "join": np.array([0, 0, WIDTH], np.int64),
        "axes": np.array([1, 2], np.int64),
        "one": np.float32(1),
        "far": np.float32(-1e4),
        "root": np.float32((WIDTH // HEADS) ** -0.5),
    }
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["hidden"], name="embed")]
    for name, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        nodes += [
            helper.make_node("MatMul", ["hidden", f"to_{name}"], [f"{name}_flat"], name=f"attention/{name}"),
            helper.make_node("Reshape", [f"{name}_flat", "split"], [f"{name}_split"]),
            helper.make_node("Transpose", [f"{name}_split"], [name], perm=order),
        ]
    nodes += [
        helper.make_node("MatMul", ["query", "key"], ["raw_scores"], name="attention/scores"),
        helper.make_node("Mul", ["raw_scores", "root"], ["scores"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["one", "mask"], ["hidden_keys"]),
        helper.make_node("Mul", ["hidden_keys", "far"], ["flat_bias"]),
        helper.make_node("Unsqueeze", ["flat_bias", "axes"], ["bias"]),
        helper.make_node("Add", ["scores", "bias"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["shares"], name="attention/softmax", axis=-1),
        helper.make_node("MatMul", ["shares", "value"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["mixed_split"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["mixed_split", "join"], ["mixed_flat"]),
        helper.make_node("MatMul", ["mixed_flat", "to_out"], ["projected"], name="attention/out"),
        helper.make_node("Add", ["projected", "hidden"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "scale", "shift"], ["last_hidden_state"], name="norm"),
    ]
    ids = (TensorProto.INT64, ["N", "T"])
    value = model(nodes, {"input_ids": ids, "attention_mask": ids}, {"last_hidden_state": (TensorProto.FLOAT, ["N", "T", WIDTH])}, weights)
    return save(path, value)


def convolutions(path: Path, kind: type[np.floating[Any]] = np.float32, is_quantised: bool = False) -> Path:
    """pixels [1,3,32,32] → features [1,16,16,16]; `kind` of all tensors; quantised: Q/DQ, signed, symmetric, weights per channel."""
    rng = np.random.default_rng(6)
    first, second = (rng.standard_normal(shape) * 0.1 for shape in ((CHANNELS, 3, 3, 3), (CHANNELS, CHANNELS, 3, 3)))
    weights: dict[str, Any] = {}
    nodes: list[Any] = []
    source = "pixels"
    for index, weight in enumerate((first, second)):
        name = f"weight_{index}"
        weights[name] = weight.astype(kind)
        if is_quantised:
            source, name = _quantised(nodes, weights, source, name, index)
        nodes += [
            helper.make_node("Conv", [source, name], [f"convolved_{index}"], name=f"conv_{index}", pads=[1] * 4, strides=[1 + index] * 2),
            helper.make_node("Relu", [f"convolved_{index}"], [f"features_{index}"], name=f"relu_{index}"),
        ]
        source = f"features_{index}"
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    value = model(nodes, {"pixels": (dtype, [1, 3, 32, 32])}, {source: (dtype, [1, CHANNELS, 16, 16])}, weights)
    return save(path, value)


def _quantised(nodes: list[Any], weights: dict[str, Any], source: str, name: str, index: int) -> tuple[str, str]:
    scales = np.abs(weights[name]).max(axis=(1, 2, 3)) / 127
    weights[f"{name}_int8"] = np.round(weights.pop(name) / scales[:, None, None, None]).astype(np.int8)
    weights.update({f"{name}_scale": scales, f"{name}_zero": np.zeros(CHANNELS, np.int8)})
    weights.update({f"scale_{index}": np.float32(0.05), f"zero_{index}": np.int8(0)})
    nodes += [
        helper.make_node("QuantizeLinear", [source, f"scale_{index}", f"zero_{index}"], [f"bytes_{index}"], name=f"quantise_{index}"),
        helper.make_node("DequantizeLinear", [f"bytes_{index}", f"scale_{index}", f"zero_{index}"], [f"input_{index}"]),
        helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale", f"{name}_zero"], [name], axis=0),
    ]
    return f"input_{index}", name


def asymmetric(path: Path) -> Path:
    """What quantising tools make by default: the activations unsigned with a zero point, and an int32 bias dequantised."""
    rng = np.random.default_rng(7)
    weights: dict[str, Any] = {
        "weight": (rng.standard_normal((8, 8)) * 0.1).astype(np.float32),
        "bias_int32": np.arange(8, dtype=np.int32),
        "scale": np.float32(0.02),
        "zero": np.int32(0),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("DequantizeLinear", ["bias_int32", "scale", "zero"], ["bias"], name="bias_dequantise"),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    value = model(nodes, {"x": (TensorProto.FLOAT, [1, 8])}, {"y": (TensorProto.FLOAT, [1, 8])}, weights)
    return save(path, value)


def unknown_operator(path: Path) -> Path:
    """A graph whose second node, `strange`, is of no operator that anybody knows."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="fine"),
        helper.make_node("Frobnicate", ["a"], ["y"], name="strange", domain="example"),
    ]
    graph = helper.make_graph(
        nodes,
        "unknown",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.zeros(1, np.float32), "unused")],
    )
    value = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("example", 1)], ir_version=8)
    onnx.save(value, str(path))
    return path
