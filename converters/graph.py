"""A loaded ONNX graph and who makes and reads each of its values."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from converters.errors import ConversionError, unsupported

# Weights beyond go to a file beside the graph: protobuf ends at 2 GiB.
EXTERNAL_FROM_BYTES = 1 << 30


class Graph:
    """One model's main graph. `producer` and `consumers` are true until nodes change; `index()` makes them true again."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.producer: dict[str, Any] = {}
        self.consumers: dict[str, list[Any]] = {}
        self.constants: dict[str, Any] = {}
        self._taken: set[str] = set()
        self.index()

    @property
    def nodes(self) -> list[Any]:
        return list(self.model.graph.node)

    @property
    def opset(self) -> int:
        return opset_of(self.model)

    @property
    def inputs(self) -> list[Any]:
        """What is fed: inputs without a default among the weights."""
        return [value for value in self.model.graph.input if value.name not in self.constants]

    @property
    def output_names(self) -> set[str]:
        return {value.name for value in self.model.graph.output}

    def index(self) -> None:
        graph = self.model.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producer = {name: node for node in graph.node for name in node.output if name}
        consumers: defaultdict[str, list[Any]] = defaultdict(list)
        for node in graph.node:
            for name in {*node.input, *captured(node)}:
                if name:
                    consumers[name].append(node)
        self.consumers = dict(consumers)
        self._taken |= {*self.constants, *self.producer, *(value.name for value in graph.input)}

    def value(self, name: str) -> NDArray[Any] | None:
        """The constant of this name."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def readers(self, name: str) -> list[Any]:
        return self.consumers.get(name, [])

    def fresh(self, name: str) -> str:
        """`name`, or with a number behind it when something is already called so."""
        candidate, number = name, 1
        while candidate in self._taken:
            candidate, number = f"{name}_{number}", number + 1
        self._taken.add(candidate)
        return candidate

    def add_constant(self, name: str, values: NDArray[Any]) -> str:
        name = self.fresh(name)
        tensor = numpy_helper.from_array(np.ascontiguousarray(values).reshape(np.shape(values)), name)
        self.model.graph.initializer.append(tensor)
        self.constants[name] = tensor
        return name

    def replace_nodes(self, nodes: Iterable[Any]) -> None:
        nodes = list(nodes)
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)
        self.index()

    def drop_unused(self) -> None:
        """Remove nodes whose outputs nobody reads, and constants that no node reads any more."""
        wanted = self.output_names
        kept: list[Any] = []
        for node in reversed(self.nodes):
            if any(name in wanted for name in node.output):
                kept.append(node)
                wanted |= {*node.input, *captured(node)}
        used = [tensor for tensor in self.model.graph.initializer if tensor.name in wanted]
        fed = [value for value in self.model.graph.input if value.name in wanted or value.name not in self.constants]
        for field, values in ((self.model.graph.initializer, used), (self.model.graph.input, fed)):
            del field[:]
            field.extend(values)
        self.replace_nodes(reversed(kept))


def read_graph(path: Path) -> Graph:
    """Load a model that was checked before (`onnx_from_onnx.check_model`): local functions are inlined, constants become weights, every
    node has a name. Raises ConversionError."""
    model = onnx.load(str(path))
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    return graph_of(model)


def graph_of(model: Any) -> Graph:
    """A model without local functions, its constants made weights, each of its nodes named."""
    for graph in graphs_of(model.graph):
        _lift_constants(graph)
    graph = Graph(model)
    names: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in names:
            node.name = f"{node.name or node.op_type}_{number}"
        names.add(node.name)
    return graph


def save_graph(model: Any, path: Path) -> Path:
    """Write a model, large weights into `{name}.data` beside it; the file has its name only when it is whole."""
    del model.graph.value_info[:]
    _forget_unused_domains(model)
    temporary = path.with_name(f".{path.name}.partial")
    if sum(_size(tensor) for tensor in model.graph.initializer) > EXTERNAL_FROM_BYTES:
        data = path.with_name(f"{path.name}.data")
        data.unlink(missing_ok=True)
        onnx.save(model, str(temporary), save_as_external_data=True, location=data.name, size_threshold=1024)
    else:
        temporary.write_bytes(model.SerializeToString())
    os.replace(temporary, path)  # noqa: PTH105  (one atomic rename)
    return path


def require_standard(model: Any, purpose: str) -> None:
    """Raises ConversionError when a node is not of ONNX's own operators."""
    strange = sorted({f"{node.domain}.{node.op_type}" for graph in graphs_of(model.graph) for node in graph.node if not is_standard(node)})
    if strange:
        raise unsupported(
            f"{purpose} reads ONNX's own operators only, and the graph uses {', '.join(strange)}; "
            "export the model without the fusions of a runtime"
        )


def is_standard(node: Any) -> bool:
    return node.domain in ("", "ai.onnx")


def opset_of(model: Any) -> int:
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def graphs_of(graph: Any) -> Iterator[Any]:
    """A graph and all graphs within its nodes."""
    yield graph
    for node in graph.node:
        for inner in bodies(node):
            yield from graphs_of(inner)


def bodies(node: Any) -> list[Any]:
    found = []
    for attribute in node.attribute:
        found.extend([attribute.g] if attribute.HasField("g") else [])
        found.extend(attribute.graphs)
    return found


def captured(node: Any) -> set[str]:
    """Values of the outside that the graphs within a node read."""
    names: set[str] = set()
    for graph in bodies(node):
        own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        own |= {name for each in graph.node for name in each.output}
        read = {name for each in graph.node for name in (*each.input, *captured(each))} | {value.name for value in graph.output}
        names |= read - own - {""}
    return names


def attribute_of(node: Any, name: str, default: Any = None) -> Any:
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def set_attribute(node: Any, name: str, value: Any) -> None:
    kept = [each for each in node.attribute if each.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def element_types(model: Any) -> dict[str, int]:
    """Value → element type, for the main graph and all graphs within it. Raises ConversionError when a type cannot be told."""
    try:
        inferred = onnx.shape_inference.infer_shapes(_without_weights(model))
    except Exception as error:  # the checker's own error, and plain ones of its C++ side
        raise ConversionError(f"the types of the graph cannot be told: {error}; export the model again") from error
    types: dict[str, int] = {}
    for graph in graphs_of(inferred.graph):
        for value in (*graph.value_info, *graph.input, *graph.output):
            types.setdefault(value.name, value.type.tensor_type.elem_type)
    for graph in graphs_of(model.graph):
        types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    return types


def _without_weights(model: Any) -> Any:
    """A copy whose large float weights are only announced: inference would copy them several times, and passes 2 GiB otherwise."""
    shell = onnx.ModelProto()
    shell.CopyFrom(_emptied(model))
    for tensor in model.graph.initializer:
        if tensor.data_type in (TensorProto.INT64, TensorProto.INT32) or _size(tensor) < 1024:
            shell.graph.initializer.append(tensor)
        elif tensor.name not in {value.name for value in shell.graph.input}:
            shell.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return shell


def _emptied(model: Any) -> Any:
    graph = onnx.GraphProto(name=model.graph.name, node=model.graph.node, input=model.graph.input, output=model.graph.output)
    return onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, graph=graph)


def _size(tensor: Any) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64)) * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _lift_constants(graph: Any) -> None:
    kept = []
    for node in graph.node:
        values = [each for each in node.attribute if each.name in ("value", "value_float", "value_floats", "value_int", "value_ints")]
        if node.op_type != "Constant" or not is_standard(node) or not values:
            kept.append(node)
            continue
        (attribute,) = values
        if attribute.name == "value":
            graph.initializer.add().CopyFrom(attribute.t)
        else:
            kind = np.float32 if "float" in attribute.name else np.int64
            graph.initializer.append(numpy_helper.from_array(np.array(helper.get_attribute_value(attribute), kind)))
        graph.initializer[-1].name = node.output[0]
    del graph.node[:]
    graph.node.extend(kept)


def _forget_unused_domains(model: Any) -> None:
    used = {"" if is_standard(node) else node.domain for graph in graphs_of(model.graph) for node in graph.node}
    kept = [entry for entry in model.opset_import if ("" if entry.domain == "ai.onnx" else entry.domain) in {*used, ""}]
    del model.opset_import[:]
    model.opset_import.extend(kept)
