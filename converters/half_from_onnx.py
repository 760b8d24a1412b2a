"""ONNX in float32 → ONNX in half precision: types are in the graph, as TensorRT takes them from version 10 on.

Inputs and outputs stay float32. Which inputs of an operator may be half precision is read from ONNX's own operator schemas.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, version_converter

from converters.errors import ConversionError
from converters.graph import Graph, attribute_of, bodies, element_types, graph_of, read_graph, require_standard, save_graph, set_attribute
from converters.sensitive_nodes import FILL, HALF_MAX, MOVERS, loud_nodes, sensitive_nodes

# Part of the engine key: raise it with every change that changes what is written.
VERSION = 2
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
QUANTISERS = frozenset(("QuantizeLinear", "DequantizeLinear"))
# The first opset whose quantisers take scales in half precision, and the smallest scale that keeps all its bits there.
QUANTISERS_SINCE = 19
SMALLEST_SCALE = float(np.finfo(np.float16).smallest_normal)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Half:
    """`nodes` that compute on floats, how many of them in half precision, and those kept in float32 for a weight beyond 65504."""

    nodes: int
    halved: int
    out_of_range: tuple[str, ...]


def half_from_onnx(
    source: Path,
    target: Path,
    keeps_fp32: Sequence[str] = (),
    with_attention: bool = False,
    peaks: Mapping[str, float] | None = None,
) -> Half:
    """Write `target`.

    keeps_fp32      fnmatch patterns of names of nodes that stay in float32, beside the sensitive ones (`sensitive_nodes.py`)
    with_attention  attention in float32 as well: the second step of the ladder
    peaks           value → largest magnitude seen (`activation_ranges.py`); nodes at values too large for half precision stay in float32

    What int8 has rounded already (`int8_from_onnx.py`) gives half precision behind its integers.

    Raises ConversionError for operators that are not ONNX's own.
    """
    graph = read_graph(source)
    require_standard(graph.model, "half precision")
    if graph.opset < 13:
        raise ConversionError(f"{source.name} has opset {graph.opset}; half precision needs 13 or later: export it again", "unsupported")
    if graph.opset < QUANTISERS_SINCE and any(node.op_type in QUANTISERS for node in graph.nodes):
        graph = _raised(graph, source.name)
    kept = sensitive_nodes(graph, keeps_fp32, with_attention) | loud_nodes(graph, peaks or {})
    kept -= {node.name for node in graph.nodes if node.op_type in QUANTISERS and _has_wide_scales(graph, node)}
    rewriting = _Rewriting(graph, kept, element_types(graph.model))
    rewriting.run()
    save_graph(graph.model, target)
    if rewriting.out_of_range:
        log.warning("weights beyond %g stay in float32 at %s", HALF_MAX, ", ".join(sorted(rewriting.out_of_range)))
    return Half(rewriting.nodes, rewriting.halved, tuple(sorted(rewriting.out_of_range)))


def fp32_nodes(source: Path, keeps_fp32: Sequence[str] = (), with_attention: bool = False) -> tuple[str, ...]:
    """Names of the nodes that `half_from_onnx` would keep: what a builder with precision flags (TensorRT 8) pins to float32."""
    return tuple(sorted(sensitive_nodes(read_graph(source), keeps_fp32, with_attention)))


def _raised(graph: Graph, name: str) -> Graph:
    try:
        return graph_of(version_converter.convert_version(graph.model, QUANTISERS_SINCE))
    except RuntimeError as error:
        raise ConversionError(
            f"{name} cannot be raised from opset {graph.opset} to {QUANTISERS_SINCE}, which int8 beside half precision needs: {error}",
            "unsupported",
        ) from error


def _has_wide_scales(graph: Graph, node: Any) -> bool:
    scales = graph.value(node.input[1])
    return scales is not None and bool(np.all(scales >= SMALLEST_SCALE)) and fits_half(scales)


class _Rewriting:
    """One pass over the nodes in their order. `_types` is what each value is now; casts are made where a reader wants another."""

    def __init__(self, graph: Graph, kept: set[str], types: dict[str, int]) -> None:
        self.nodes = 0
        self.halved = 0
        self.out_of_range: set[str] = set()
        self._graph = graph
        self._kept = kept
        self._types = types
        self._copies: dict[tuple[str, int], str] = {}
        self._written: list[Any] = []
        self._opsets = graph.opset

    def run(self) -> None:
        outputs = self._graph.output_names
        for node in self._graph.nodes:
            self._node(node)
        for name in outputs:
            if self._types.get(name) == HALF:
                self._give_back(name)
        self._graph.replace_nodes(self._written)
        self._graph.drop_unused()

    def _node(self, node: Any) -> None:
        if bodies(node):
            _read_as_float(node, self._as)
            self._written.append(node)
            return
        floats = [name for name in node.input if self._types.get(name) in (FLOAT, HALF)]
        made = [name for name in node.output if self._types.get(name) == FLOAT]
        self.nodes += bool(made)
        if node.op_type == "Cast":
            self._cast(node)
        elif made or floats:
            is_half = bool(floats or node.op_type == "ConstantOfShape") and self._is_half(node, floats)
            self.halved += is_half and bool(made)
            self._retype(node, HALF if is_half else FLOAT)
        self._written.append(node)

    def _is_half(self, node: Any, floats: list[str]) -> bool:
        if node.name in self._kept:
            return False
        if node.op_type in MOVERS or not [name for name in node.output if self._types.get(name) == FLOAT]:
            computed = [self._types[name] for name in floats if name not in self._graph.constants]
            if computed:
                return HALF in computed
        if any(not fits_half(values) for name in floats if (values := self._graph.value(name)) is not None):
            self.out_of_range.add(node.name)
            return False
        schema_types = _allowed(node, self._opsets, node.input, "inputs")
        return any(schema_types.get(name) for name in floats) or node.op_type == "ConstantOfShape"

    def _retype(self, node: Any, wanted: int) -> None:
        may_be_half = _allowed(node, self._opsets, node.input, "inputs")
        for index, name in enumerate(node.input):
            if self._types.get(name) in (FLOAT, HALF):
                node.input[index] = self._as(name, wanted if may_be_half[name] else FLOAT)
        gives_half = _allowed(node, self._opsets, node.output, "outputs")
        for name in node.output:
            if self._types.get(name) == FLOAT and gives_half[name]:
                self._types[name] = wanted
        if wanted == HALF and node.op_type == "ConstantOfShape":
            value = attribute_of(node, "value")
            filled = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
            set_attribute(node, "value", numpy_helper.from_array(to_half(filled)))

    def _cast(self, node: Any) -> None:
        """A cast of half precision to float32 would undo it; one from integers gives exact float32, rounded where it is read."""
        if attribute_of(node, "to") == FLOAT and self._types.get(node.input[0]) == HALF and node.name not in self._kept:
            set_attribute(node, "to", HALF)
            self._types[node.output[0]] = HALF
            self.halved += 1

    def _as(self, name: str, wanted: int) -> str:
        """The name under which a value can be read in a type."""
        if self._types[name] == wanted:
            return name
        if (name, wanted) not in self._copies:
            values = self._graph.value(name)
            suffix = "half" if wanted == HALF else "float"
            if values is not None and wanted == HALF:
                copy = self._graph.add_constant(f"{name}.{suffix}", to_half(values))
            else:
                copy = self._graph.fresh(f"{name}.{suffix}")
                self._written.append(helper.make_node("Cast", [name], [copy], name=copy, to=wanted))
            self._types[copy] = wanted
            self._copies[name, wanted] = copy
        return self._copies[name, wanted]

    def _give_back(self, name: str) -> None:
        """Let a graph output be float32 again: what was made under its name gets another."""
        inner = self._graph.fresh(f"{name}.half")
        for node in self._written:
            node.input[:] = [inner if each == name else each for each in node.input]
            node.output[:] = [inner if each == name else each for each in node.output]
        self._written.append(helper.make_node("Cast", [inner], [name], name=f"{name}.give_back", to=FLOAT))


def _read_as_float(node: Any, convert: Any) -> None:
    """Graphs within a node stay float32; what they read of the outside is handed to them as such."""
    for body in bodies(node):
        own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        own |= {name for each in body.node for name in each.output}
        for inner in body.node:
            _read_as_float(inner, convert)
            inner.input[:] = [name if not name or name in own else convert(name, FLOAT) for name in inner.input]


def fits_half(values: NDArray[Any]) -> bool:
    """Are all finite values within half precision, fills of masks aside?"""
    if values.dtype != np.float32:
        return True
    magnitudes = np.abs(values[np.isfinite(values)])
    return not bool(np.any((magnitudes > HALF_MAX) & (magnitudes < FILL)))


def to_half(values: NDArray[Any]) -> NDArray[np.float16]:
    """Rounded to half precision; fills of masks become the lowest or highest value there is, infinities stay."""
    bounded = np.where(np.isinf(values), values, np.clip(values, -HALF_MAX, HALF_MAX))
    return np.asarray(bounded, np.float16).reshape(values.shape)


def _allowed(node: Any, opset: int, names: Sequence[str], side: str) -> dict[str, bool]:
    """Value → may it be half precision at this operator, as its schema says?"""
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    types = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    formal = list(getattr(schema, side))
    answer: dict[str, bool] = {}
    for index, name in enumerate(names):
        kind = formal[min(index, len(formal) - 1)].type_str
        answer[name] = answer.get(name, True) and "tensor(float16)" in types.get(kind, [kind])
    return answer
