"""Which nodes of a graph must not be rounded to half precision: pure decisions from the graph alone.

Engines of the DETR family lose boxes in half precision where normalisation, coordinates or attention scores are rounded
(NVIDIA/TensorRT#3652, Intellindust-AI-Lab/DEIMv2#112, roboflow/rf-detr#176).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from converters.graph import Graph

HALF_MAX = float(np.finfo(np.float16).max)
# Below half of the smallest subnormal a value becomes zero.
HALF_TINY = float(np.finfo(np.float16).smallest_subnormal) / 2
# Attention masks fill with about -3.4e38 or -1e30: any very low value serves as well.
FILL = 1e29


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Sums of many terms, differences of close numbers, indices and choices.
SENSITIVE = words(
    "LayerNormalization InstanceNormalization GroupNormalization RMSNormalization LpNormalization MeanVarianceNormalization "
    "ReduceMean ReduceSum ReduceSumSquare ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceProd Pow Sqrt Reciprocal Log Exp "
    "TopK ArgMax ArgMin NonMaxSuppression Range CumSum OneHot Mod EyeLike RandomNormal RandomUniform RandomNormalLike "
    "RandomUniformLike Multinomial Bernoulli If Loop Scan QuantizeLinear DequantizeLinear DynamicQuantizeLinear"
)
# Their inputs are computed exactly, back to the next product of matrices.
_ROOTS = {"TopK": (0,), "Log": (0,), "Sqrt": (0,), "GridSample": (1,), "NonMaxSuppression": (0, 1), "ArgMax": (0,), "Range": (0, 1, 2)}
_CHOICES = {"TopK": (0,), "GridSample": (1,), "NonMaxSuppression": (0, 1), "ArgMax": (0,)}
_STATISTICS = words("ReduceMean ReduceSum ReduceSumSquare ReduceL1 ReduceL2 Sqrt Reciprocal")
_ELEMENTWISE = words(
    "Add Sub Mul Div Pow Clip Max Min Neg Abs Sigmoid Tanh Where Floor Ceil Round Mod Exp Log Sqrt Reciprocal Sum Softplus"
)
# They move values and round none: their type is that of what they move.
MOVERS = words(
    "Reshape Transpose Squeeze Unsqueeze Concat Split Slice Gather GatherElements GatherND Expand Tile Flatten Identity Pad "
    "DepthToSpace SpaceToDepth ReduceMax ReduceMin"
)
_BETWEEN_SCORES = _ELEMENTWISE | MOVERS | {"Cast", "Dropout", "IsNaN"}


def sensitive_nodes(graph: Graph, patterns: Sequence[str] = (), with_attention: bool = False) -> set[str]:
    """Names of nodes to compute in float32.

    patterns        fnmatch patterns of further names
    with_attention  the second step of the ladder: also each softmax with the two products of matrices around it
    """
    kept = {node.name for node in graph.nodes if node.op_type in SENSITIVE or _matches(node.name, patterns)}
    kept |= {node.name for node in graph.nodes if _has_delicate_scalar(graph, node)}
    for node in graph.nodes:
        if node.op_type in _STATISTICS:
            kept |= _around_statistic(graph, node)
    ends = frozenset(kept)
    for node in graph.nodes:
        for index in _ROOTS.get(node.op_type, ()):
            kept |= _chain_before(graph, node.input[index : index + 1], ends)
        if node.op_type == "Cast" and _is_integer_cast(node):
            kept |= _chain_before(graph, node.input, ends)
    kept |= _chain_before(graph, graph.output_names, ends)
    return kept | attention_nodes(graph) if with_attention else kept


def attention_nodes(graph: Graph) -> set[str]:
    """Names of the nodes of each attention: both products of matrices, the softmax, and what lies between."""
    found: set[str] = set()
    for softmax in (node for node in graph.nodes if node.op_type == "Softmax"):
        before = _walk(graph, [softmax], backwards=True)
        behind = _walk(graph, [softmax], backwards=False)
        if any(node.op_type == "MatMul" for node in behind) and any(node.op_type == "MatMul" for node in before):
            found |= {node.name for node in (*before, *behind, softmax)}
    return found


def last_products(graph: Graph) -> set[str]:
    """Names of convolutions and products that scores, coordinates and outputs are read from with nothing but elementwise steps between:
    eight bits are too few for them."""
    found: set[str] = set()
    pending = list(graph.output_names)
    for node in graph.nodes:
        pending.extend(name for index in _CHOICES.get(node.op_type, ()) for name in node.input[index : index + 1])
    seen: set[str] = set()
    while pending:
        node = graph.producer.get(pending.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            found.add(node.name)
        elif node.op_type in _ELEMENTWISE | MOVERS | {"Softmax"}:
            pending.extend(node.input)
    return found


def loud_nodes(graph: Graph, peaks: Mapping[str, float]) -> set[str]:
    """Names of nodes that read or write a value whose largest magnitude came near to what half precision holds."""
    loud = {name for name, peak in peaks.items() if not peak < HALF_MAX / 2}
    return {node.name for node in graph.nodes if loud & {*node.input, *node.output}}


def _walk(graph: Graph, starts: Sequence[Any], backwards: bool) -> list[Any]:
    """Nodes from `starts` over elementwise ones up to, and with, the first products of two computed matrices."""
    found: dict[str, Any] = {}
    pending = list(starts)
    while pending:
        node = pending.pop()
        makers = [graph.producer.get(name) for name in node.input]
        near = makers if backwards else [reader for name in node.output for reader in graph.readers(name)]
        for other in near:
            if other is None or other.name in found:
                continue
            if other.op_type == "MatMul" and not any(name in graph.constants for name in other.input):
                found[other.name] = other
            elif other.op_type in _BETWEEN_SCORES:
                found[other.name] = other
                pending.append(other)
    return list(found.values())


def _chain_before(graph: Graph, names: Iterable[str], ends: frozenset[str]) -> set[str]:
    """Elementwise and moving nodes that a value is made by, back to the first that computes otherwise or is a normalisation's: over those
    written out, the chain would follow the residuals through the whole network."""
    chain: set[str] = set()
    pending = list(names)
    while pending:
        node = graph.producer.get(pending.pop())
        if node is not None and node.name not in chain and node.op_type in _ELEMENTWISE | MOVERS:
            chain.add(node.name)
            pending.extend(() if node.name in ends else node.input)
    return chain


def _around_statistic(graph: Graph, node: Any) -> set[str]:
    """What is squared for a statistic, and what it is subtracted from, divided by or scaled with: a normalisation written out."""
    around = {reader.name for name in node.output for reader in graph.readers(name) if reader.op_type in _ELEMENTWISE}
    maker = graph.producer.get(node.input[0])
    if maker is not None and (maker.op_type in ("Pow", "Abs") or (maker.op_type == "Mul" and maker.input[0] == maker.input[1])):
        around.add(maker.name)
    return around


def _has_delicate_scalar(graph: Graph, node: Any) -> bool:
    """Is a number of the node's one that half precision turns into zero, or into one? (epsilons, 1 - epsilon)"""
    for name in node.input:
        tensor = graph.constants.get(name)
        if tensor is None or tensor.data_type != tensor.FLOAT or int(np.prod(tensor.dims)) != 1:
            continue
        values = graph.value(name)
        value = float("nan") if values is None else float(values.reshape(-1)[0])
        if 0 < abs(value) <= HALF_TINY or (value != 1 and abs(value) < 2 and np.float16(value) == 1):
            return True
    return False


def _is_integer_cast(node: Any) -> bool:
    from onnx import TensorProto

    kinds = {TensorProto.INT32, TensorProto.INT64, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16}
    return any(attribute.name == "to" and attribute.i in kinds for attribute in node.attribute)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
