"""Quantised ONNX → plain float operators with the dequantised weights: what TensorRT reads, and what may then be quantised for it anew.

Understood are weights that are dequantised in the graph, pairs of QuantizeLinear and DequantizeLinear, and dynamic quantisation
(DynamicQuantizeLinear with MatMulInteger or ConvInteger, and ONNX Runtime's DynamicQuantizeMatMul and MatMulIntegerToFloat). Activations
are rounded no more, so the result is nearer to the model that was quantised once than the quantised graph was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from converters.errors import unsupported
from converters.graph import Graph, attribute_of, graphs_of, read_graph, save_graph
from converters.sensitive_nodes import MOVERS, words

# Part of the engine key: raise it with every change that changes what is written.
VERSION = 1
QUANTISED = words(
    "QuantizeLinear DequantizeLinear DynamicQuantizeLinear MatMulInteger ConvInteger DynamicQuantizeMatMul MatMulIntegerToFloat"
)
_FORMS_REFUSED = words("QLinearMatMul QLinearConv QLinearAdd QLinearMul QLinearSigmoid QAttention DynamicQuantizeLSTM MatMulNBits QGemm")

Float = NDArray[np.float32]


def is_quantised(model: Any) -> bool:
    return any(node.op_type in QUANTISED | _FORMS_REFUSED for graph in graphs_of(model.graph) for node in graph.node)


def plain_from_quantised(source: Path, target: Path) -> Path:
    """Write `target`. Raises ConversionError for forms of quantisation that are not read here."""
    graph = read_graph(source)
    refused = sorted({node.op_type for node in graph.nodes if node.op_type in _FORMS_REFUSED})
    inner = sorted({n.op_type for g in list(graphs_of(graph.model.graph))[1:] for n in g.node if n.op_type in QUANTISED | _FORMS_REFUSED})
    if refused or inner:
        raise unsupported(
            f"{source.name} is quantised with {', '.join(refused or inner)}{' within a branch' if inner else ''}, which is not read here; "
            "give the model as it was before quantisation"
        )
    _Plain(graph).run()
    _fold_scales(graph)
    graph.drop_unused()
    return save_graph(graph.model, target)


class _Plain:
    """One pass over the nodes. `_real`: integer value → the float value it was rounded from; `_scale`: → the constant it was divided by;
    `_same`: value → the value that now stands for it."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._real: dict[str, str] = {}
        self._scale: dict[str, str] = {}
        self._same: dict[str, str] = {}
        self._floats: set[str] = set()
        self._written: list[Any] = []

    def run(self) -> None:
        steps = {
            "DynamicQuantizeLinear": self._dynamic,
            "QuantizeLinear": self._quantise,
            "DequantizeLinear": self._dequantise,
            "MatMulInteger": self._integer_product,
            "ConvInteger": self._integer_product,
            "DynamicQuantizeMatMul": self._product_of_floats,
            "MatMulIntegerToFloat": self._product_to_float,
            "Cast": self._cast,
            "Mul": self._multiply,
        }
        for node in self._graph.nodes:
            node.input[:] = [self._same.get(name, name) for name in node.input]
            step = steps.get(node.op_type)
            if step is not None:
                step(node)
            elif node.op_type in MOVERS and node.input[0] in self._real:
                node.input[0] = self._real[node.input[0]]
                # What is moved stays what it was rounded from.
                self._real.update({name: name for name in node.output})
                self._written.append(node)
            else:
                self._written.append(node)
        for name in self._graph.output_names & set(self._same):
            self._node("Identity", [self._same[name]], name)
        self._graph.replace_nodes(self._written)

    def _dynamic(self, node: Any) -> None:
        self._real[node.output[0]] = node.input[0]
        # The rest of the graph multiplies with this scale: by one, as nothing is divided by it any more.
        self._constant_for(node.output[1], np.array(1, np.float32))
        self._constant_for(node.output[2], np.array(0, np.uint8))

    def _quantise(self, node: Any) -> None:
        values = self._graph.value(node.input[0])
        if values is not None:
            raise unsupported(f"{node.name} rounds a weight within the graph; export the model with its weights as integers or as floats")
        value = node.input[0]
        if self._cuts_at_zero(node):
            value = self._node("Relu", [value], self._graph.fresh(f"{node.output[0]}.cut"))
        self._real[node.output[0]], self._scale[node.output[0]] = value, node.input[1]

    def _cuts_at_zero(self, node: Any) -> bool:
        """Is its zero point the least of its type? Quantizers drop a Relu before such a node, which does the same."""
        zero = self._graph.value(node.input[2]) if len(node.input) > 2 else np.zeros((), np.uint8)
        maker = self._graph.producer.get(node.input[0])
        if zero is None or (maker is not None and maker.op_type == "Relu"):
            return False
        return bool(np.all(zero == np.iinfo(zero.dtype).min))

    def _dequantise(self, node: Any) -> None:
        name, output = node.input[0], node.output[0]
        if name in self._real:
            self._same[output] = self._real[name]
            return
        scale, zero = self._scale_and_zero(node, 1, 2)
        axis, block = attribute_of(node, "axis", 1), attribute_of(node, "block_size", 0)
        values = self._graph.value(name)
        if values is not None:
            self._constant_for(output, dequantised(values, scale, zero, axis, block))
            return
        maker = self._graph.producer.get(name)
        table = self._graph.value(maker.input[0]) if maker is not None and maker.op_type == "Gather" else None
        if maker is None or table is None or scale.size != 1:
            raise unsupported(f"{node.name} dequantises {name}, of which is not known what it was rounded from")
        floats = self._graph.add_constant(f"{output}.table", dequantised(table, scale, zero, axis, block))
        self._node("Gather", [floats, maker.input[1]], output, axis=attribute_of(maker, "axis", 0))

    def _integer_product(self, node: Any) -> None:
        operands = [self._integers(node, 0, 2), self._integers(node, 1, 3)]
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        self._node(node.op_type.removesuffix("Integer"), operands, node.output[0], **attributes)
        self._floats.add(node.output[0])

    def _product_of_floats(self, node: Any) -> None:
        self._product(node, node.input[0], self._weight(node, 1, 2, 3), bias=4)

    def _product_to_float(self, node: Any) -> None:
        if node.input[0] not in self._real:
            raise unsupported(f"{node.name} multiplies {node.input[0]}, of which is not known what it was rounded from")
        self._product(node, self._real[node.input[0]], self._weight(node, 1, 3, 5), bias=6)

    def _product(self, node: Any, left: str, right: str, bias: int) -> None:
        has_bias = len(node.input) > bias and node.input[bias]
        product = self._graph.fresh(f"{node.output[0]}.product") if has_bias else node.output[0]
        self._node("MatMul", [left, right], product)
        if has_bias:
            self._node("Add", [product, node.input[bias]], node.output[0])

    def _cast(self, node: Any) -> None:
        if node.input[0] in self._floats:
            if attribute_of(node, "to") != TensorProto.FLOAT:
                raise unsupported(f"{node.name} reads a product of integers as such; give the model as it was before quantisation")
            self._same[node.output[0]] = node.input[0]
        else:
            self._written.append(node)

    def _multiply(self, node: Any) -> None:
        left, right = self._graph.value(node.input[0]), self._graph.value(node.input[1])
        if left is not None and right is not None:
            self._constant_for(node.output[0], np.asarray(left * right))
        else:
            self._written.append(node)

    def _integers(self, node: Any, index: int, zero_index: int) -> str:
        """An operand of a product of integers as floats, its zero point taken off."""
        name = node.input[index]
        values = self._graph.value(name)
        if values is not None:
            zero = self._graph.value(node.input[zero_index]) if len(node.input) > zero_index and node.input[zero_index] else None
            one = np.ones((), np.float32)
            # A zero point per row of the left factor, per column of the right one, per channel of a filter.
            axis = 0 if node.op_type == "ConvInteger" else -1 if index else -2
            return self._graph.add_constant(f"{name}.floats", dequantised(values, one, zero, axis))
        if name not in self._real:
            raise unsupported(f"{node.name} multiplies {name}, of which is not known what it was rounded from")
        if name not in self._scale:
            return self._real[name]
        return self._node("Div", [self._real[name], self._scale[name]], self._graph.fresh(f"{name}.scaled"))

    def _weight(self, node: Any, index: int, scale_index: int, zero_index: int) -> str:
        values = self._graph.value(node.input[index])
        if values is None:
            raise unsupported(f"{node.name} multiplies with {node.input[index]}, which is no constant")
        scale, zero = self._scale_and_zero(node, scale_index, zero_index)
        return self._graph.add_constant(f"{node.input[index]}.floats", dequantised(values, scale, zero, values.ndim - 1))

    def _scale_and_zero(self, node: Any, scale_index: int, zero_index: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
        scale = self._graph.value(node.input[scale_index])
        if scale is None:
            raise unsupported(f"{node.name} has the computed scale {node.input[scale_index]}; give the model as it was before quantisation")
        has_zero = len(node.input) > zero_index and node.input[zero_index]
        return scale, self._graph.value(node.input[zero_index]) if has_zero else None

    def _constant_for(self, name: str, values: NDArray[Any]) -> None:
        self._same[name] = self._graph.add_constant(f"{name}.value", values)

    def _node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self._written.append(helper.make_node(operator, list(inputs), [output], name=f"{output}/{operator}", **attributes))
        return output


def dequantised(values: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any] | None, axis: int, block: int = 0) -> Float:
    """(values - zero) · scale, the two per tensor, per index of `axis`, or per `block` indices of it. As DequantizeLinear, opset 21."""

    def spread(part: NDArray[Any]) -> NDArray[Any]:
        if part.size == 1:
            return part.reshape(())
        if block:
            return np.repeat(part, block, axis=axis).take(range(values.shape[axis]), axis=axis)
        if part.ndim > 1:
            return part
        shape = [1] * values.ndim
        shape[axis] = -1
        return part.reshape(shape)

    centred = values.astype(np.float32) - (0 if zero is None else spread(zero.astype(np.float32)))
    return np.asarray(centred * spread(scale.astype(np.float32)), np.float32)


def _fold_scales(graph: Graph) -> None:
    """Multiply weights with the constant that their products are multiplied with: integers as floats would overflow half precision."""
    for node in graph.nodes:
        if node.op_type != "Mul":
            continue
        factors = [name for name in node.input if name in graph.constants]
        maker = next((graph.producer[name] for name in node.input if name in graph.producer), None)
        if len(factors) != 1 or maker is None or maker.op_type not in ("MatMul", "Conv") or len(graph.readers(maker.output[0])) != 1:
            continue
        weight, scale = graph.value(maker.input[1]), graph.value(factors[0])
        if weight is None or scale is None or maker.output[0] in graph.output_names or len(maker.input) > 2:
            continue
        along = _along_columns(weight, scale) if maker.op_type == "MatMul" else _along_channels(weight, scale)
        if along is None:
            continue
        maker.input[1] = graph.add_constant(f"{maker.input[1]}.scaled", np.asarray(weight * along, np.float32))
        node.op_type = "Identity"
        node.input[:] = [maker.output[0]]
    _forget_identities(graph)


def _along_columns(weight: Float, scale: Float) -> Float | None:
    return scale if scale.size == 1 or scale.shape == (scale.size,) == weight.shape[-1:] else None


def _along_channels(weight: Float, scale: Float) -> Float | None:
    """A scale [1, channels, 1, …] of a convolution's result as one of its filters [channels, …]."""
    if scale.size == 1:
        return scale.reshape(())
    if scale.ndim == weight.ndim and scale.shape[1] == scale.size == weight.shape[0]:
        return scale.reshape(-1, *[1] * (weight.ndim - 1))
    return None


def _forget_identities(graph: Graph) -> None:
    graph.index()
    same = {
        node.output[0]: node.input[0] for node in graph.nodes if node.op_type == "Identity" and node.output[0] not in graph.output_names
    }

    def source(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    kept = [node for node in graph.nodes if node.output[0] not in same]
    for node in kept:
        node.input[:] = [source(name) for name in node.input]
    graph.replace_nodes(kept)
