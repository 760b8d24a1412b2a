"""Operators written out in simpler ones, for parsers that do not have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from onnx import helper

from converters.errors import unsupported
from converters.graph import Graph, attribute_of


def write_out(graph: Graph, operators: frozenset[str]) -> None:
    """Replace the named operators of the main graph. Raises ConversionError for one that cannot be written out here."""
    if not operators:
        return
    unknown = operators - set(_WAYS)
    if unknown:
        raise unsupported(f"{', '.join(sorted(unknown))} cannot be written out; known are {', '.join(_WAYS)}")
    nodes: list[Any] = []
    for node in graph.nodes:
        nodes.extend(_WAYS[node.op_type](graph, node) if node.op_type in operators else [node])
    graph.replace_nodes(nodes)


def _layer_normalisation(graph: Graph, node: Any) -> Iterator[Any]:
    """https://onnx.ai/onnx/operators/onnx__LayerNormalization.html"""
    value, scale, *bias = node.input
    axis = attribute_of(node, "axis", -1)
    if axis >= 0 or any(node.output[1:]):
        raise unsupported(f"{node.name} normalises from axis {axis} on with {len(node.output)} outputs; only the last axes are known here")
    axes = list(range(axis, 0))
    epsilon = graph.add_constant(f"{node.name}.epsilon", np.array(attribute_of(node, "epsilon", 1e-5), np.float32))
    names = {
        part: graph.fresh(f"{node.name}.{part}")
        for part in ("mean", "centred", "square", "variance", "above", "deviation", "normal", "scaled")
    }
    last = node.output[0]

    def step(operator: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", **attributes)

    def mean(source: str, output: str) -> Any:
        # From opset 18 on the axes are an input.
        if graph.opset < 18:
            return step("ReduceMean", [source], output, axes=axes)
        return step("ReduceMean", [source, graph.add_constant(f"{output}.axes", np.array(axes, np.int64))], output)

    yield mean(value, names["mean"])
    yield step("Sub", [value, names["mean"]], names["centred"])
    yield step("Mul", [names["centred"], names["centred"]], names["square"])
    yield mean(names["square"], names["variance"])
    yield step("Add", [names["variance"], epsilon], names["above"])
    yield step("Sqrt", [names["above"]], names["deviation"])
    yield step("Div", [names["centred"], names["deviation"]], names["normal"])
    yield step("Mul", [names["normal"], scale], names["scaled"] if bias else last)
    if bias:
        yield step("Add", [names["scaled"], bias[0]], last)


_WAYS: dict[str, Callable[[Graph, Any], Iterator[Any]]] = {"LayerNormalization": _layer_normalisation}
