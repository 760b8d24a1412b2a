"""ONNX in float32 → int8 by pairs of QuantizeLinear and DequantizeLinear around convolutions and products with weights.

`signed` is the form that TensorRT parses: symmetric, weights per channel, bias in float32
(https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html). `unsigned` is the one that ONNX Runtime
fuses into integer kernels on CPUs: activations from 0 to 255 with a zero point, results rounded too, bias in int32
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from converters.activation_ranges import Feed, Range, activation_ranges
from converters.errors import ConversionError
from converters.graph import Graph, attribute_of, read_graph, require_standard, save_graph
from converters.sensitive_nodes import last_products
from models.manifest import RangeMethod as Method

# Part of the engine key: raise it with every change that changes what is written.
VERSION = 1
OPERATORS = ("Conv", "MatMul", "Gemm")
_NORMALISING = frozenset(("Cast", "Transpose", "Mul", "Div", "Sub", "Add"))

Form = Literal["signed", "unsigned"]


@dataclass(frozen=True)
class Int8:
    """`nodes` that compute on integers now, of `candidates` that could; `peaks`: value → largest magnitude seen before rounding."""

    nodes: int
    candidates: int
    peaks: dict[str, float]


def int8_from_onnx(
    source: Path,
    target: Path,
    inputs: Sequence[Feed],
    method: Method = "least_error",
    excluded: Sequence[str] = (),
    form: Form = "signed",
    keeps_ends: bool = True,
    cache: Path | None = None,
    threads: int = 2,
) -> Int8:
    """Write `target`.

    inputs      representative ones (`calibration.py`)
    excluded    fnmatch patterns of names of nodes that stay in float32; products of two computed matrices, as in attention, always do
    keeps_ends  leave the convolutions that read the inputs, and the last products before scores, coordinates and outputs, in float32
    cache       folder that keeps the ranges found

    Raises ConversionError.
    """
    graph = read_graph(source)
    require_standard(graph.model, "int8")
    if graph.opset < 13:
        raise ConversionError(f"{source.name} has opset {graph.opset}; int8 with a scale per channel needs 13 or later", "unsupported")
    candidates = [node for node in graph.nodes if _has_weight(graph, node)]
    ends = _ends(graph) if keeps_ends else set()
    chosen = [node for node in candidates if node.name not in ends and not any(fnmatchcase(node.name, pattern) for pattern in excluded)]
    if not chosen:
        raise ConversionError(
            f"{source.name} has nothing to make int8: {len(candidates)} products with weights, all of them excluded or at its ends",
            "bad_request",
        )
    names = sorted({node.input[0] for node in chosen} | ({_result(graph, node) for node in chosen} if form == "unsigned" else set()))
    ranges = activation_ranges(source, names, inputs, method, threads, cache)
    _Rounding(graph, ranges, form).run({node.name for node in chosen})
    save_graph(graph.model, target)
    return Int8(len(chosen), len(candidates), {name: each.peak for name, each in ranges.items()})


def _ends(graph: Graph) -> set[str]:
    fed = {value.name for value in graph.inputs}
    for node in graph.nodes:
        # Pictures may be normalised within the graph.
        if node.op_type in _NORMALISING and all(name in fed or name in graph.constants for name in node.input):
            fed.update(node.output)
    return last_products(graph) | {node.name for node in graph.nodes if node.op_type == "Conv" and node.input[0] in fed}


class _Rounding:
    def __init__(self, graph: Graph, ranges: dict[str, Range], form: Form) -> None:
        self._graph = graph
        self._ranges = ranges
        self._form = form
        self._pairs: dict[str, str] = {}
        self._scales: dict[str, float] = {}
        self._written: list[Any] = []

    def run(self, chosen: set[str]) -> None:
        dropped: set[str] = set()
        for node in self._graph.nodes:
            if node.name in dropped:
                continue
            if node.name not in chosen:
                self._written.append(node)
                continue
            rounded = self._pair(node.input[0])
            scales = self._weight(node)
            if len(node.input) > 2 and node.input[2] and self._form == "unsigned":
                self._bias(node, self._scales[node.input[0]] * scales)
            node.input[0] = rounded
            self._written.append(node)
            if self._form == "unsigned":
                # Rounding to a range that begins at zero does what the Relu does.
                relu = _only_relu(self._graph, node)
                if relu is not None:
                    dropped.add(relu.name)
                    node.output[0] = relu.output[0]
                self._round_result(node)
        self._graph.replace_nodes(self._written)
        self._graph.drop_unused()

    def _pair(self, name: str) -> str:
        """The value rounded to integers and back; once for all that read it."""
        if name not in self._pairs:
            self._pairs[name] = self._round(name, name, self._graph.fresh(f"{name}.rounded"))
        return self._pairs[name]

    def _round_result(self, node: Any) -> None:
        """All readers get the rounded result: only then does the convolution itself give integers."""
        name = node.output[0]
        inner = self._graph.fresh(f"{name}.exact")
        node.output[0] = inner
        self._pairs[name] = self._round(name, inner, name)

    def _round(self, name: str, source: str, target: str) -> str:
        scale, zero = _scale_of(self._ranges[name], self._form)
        self._scales[name] = float(scale)
        facts = [self._graph.add_constant(f"{name}.scale", scale), self._graph.add_constant(f"{name}.zero", zero)]
        integers = self._graph.fresh(f"{name}.integers")
        for operator, given, made in (("QuantizeLinear", source, integers), ("DequantizeLinear", integers, target)):
            self._written.append(helper.make_node(operator, [given, *facts], [made], name=f"{made}/{operator}"))
        return target

    def _weight(self, node: Any) -> NDArray[np.float32]:
        """Round a node's weight per channel of its result; returns the scales."""
        name = node.input[1]
        values = self._graph.value(name)
        if values is None:
            raise ConversionError(f"{node.name} has no constant weight", "bad_request")
        axis = _channel_axis(node, values)
        key = f"{name}.{axis}"
        peaks = np.abs(values).max(axis=tuple(index for index in range(values.ndim) if index != axis))
        scales = np.where(peaks > 0, peaks / 127, 1).astype(np.float32)
        if key not in self._pairs:
            spread = scales.reshape([-1 if index == axis else 1 for index in range(values.ndim)])
            integers = np.clip(np.rint(values / spread), -127, 127).astype(np.int8)
            facts = [
                self._graph.add_constant(f"{name}.int8", integers),
                self._graph.add_constant(f"{name}.scale", scales),
                self._graph.add_constant(f"{name}.zero", np.zeros(len(scales), np.int8)),
            ]
            made = self._graph.fresh(f"{name}.rounded")
            self._written.append(helper.make_node("DequantizeLinear", facts, [made], name=f"{made}/DequantizeLinear", axis=axis))
            self._pairs[key] = made
        node.input[1] = self._pairs[key]
        return scales

    def _bias(self, node: Any, scales: NDArray[np.float32]) -> None:
        values = self._graph.value(node.input[2])
        if values is None or values.shape != scales.shape:
            return
        integers = np.clip(np.rint(values / scales), -(2**31), 2**31 - 1).astype(np.int32)
        facts = [
            self._graph.add_constant(f"{node.name}.bias", integers),
            self._graph.add_constant(f"{node.name}.bias_scale", scales.astype(np.float32)),
        ]
        node.input[2] = self._graph.fresh(f"{node.name}.bias_rounded")
        self._written.append(helper.make_node("DequantizeLinear", facts, [node.input[2]], name=f"{node.input[2]}/DequantizeLinear", axis=0))


def _scale_of(given: Range, form: Form) -> tuple[NDArray[np.float32], NDArray[Any]]:
    if form == "signed":
        bound = max(-given.low, given.high)
        return np.array(bound / 127 if bound > 0 else 1, np.float32), np.array(0, np.int8)
    low, high = min(given.low, 0.0), max(given.high, 0.0)
    scale = np.float32((high - low) / 255 if high > low else 1)
    return np.array(scale), np.array(np.clip(np.rint(-low / scale), 0, 255), np.uint8)


def _has_weight(graph: Graph, node: Any) -> bool:
    """Is it a convolution, or a product of something computed with a constant matrix?"""
    if node.op_type not in OPERATORS or node.input[0] in graph.constants:
        return False
    weight = graph.constants.get(node.input[1])
    if weight is None or weight.data_type != weight.FLOAT or (node.op_type != "Conv" and len(weight.dims) != 2):
        return False
    return node.op_type != "Gemm" or (
        attribute_of(node, "alpha", 1.0),
        attribute_of(node, "beta", 1.0),
        attribute_of(node, "transA", 0),
    ) == (1, 1, 0)


def _channel_axis(node: Any, weight: NDArray[Any]) -> int:
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute_of(node, "transB", 0)):
        return 0
    return int(weight.ndim) - 1


def _only_relu(graph: Graph, node: Any) -> Any | None:
    readers = graph.readers(node.output[0])
    is_only = len(readers) == 1 and readers[0].op_type == "Relu" and node.output[0] not in graph.output_names
    return readers[0] if is_only else None


def _result(graph: Graph, node: Any) -> str:
    relu = _only_relu(graph, node)
    return str((node if relu is None else relu).output[0])
