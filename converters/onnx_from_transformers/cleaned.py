"""An exported graph made plain: one float type, named axes, nothing that no output needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from converters.graph import graphs_of, read_graph, save_graph

# What the oldest runtime that a device may bring reads (ONNX Runtime 1.19, the last for Python 3.8).
IR_VERSION = 9


def write_cleaned(path: Path, axes: Mapping[str, Mapping[int, str]]) -> list[Path]:
    """Rewrite the graph at `path`; returns the files that it now consists of, the graph first.

    `axes`: input or output → position → name; what has no name there keeps its number.
    """
    graph = read_graph(path)
    model = graph.model
    for each in graphs_of(model.graph):
        _without_doubles(each)
    graph.index()
    graph.drop_unused()
    for value in (*model.graph.input, *model.graph.output):
        for position, dimension in enumerate(value.type.tensor_type.shape.dim):
            name = axes.get(value.name, {}).get(position)
            if name is not None:
                dimension.dim_param = name
            elif dimension.HasField("dim_param"):  # the exporter's own, such as Addlogits_dim_1
                dimension.Clear()
    model.producer_name = "hotspare"
    model.ir_version = min(model.ir_version, IR_VERSION)
    for node in model.graph.node:
        node.doc_string = ""
    save_graph(model, path)
    data = path.with_name(f"{path.name}.data")
    return [path, *([data] if data.exists() else [])]


def _without_doubles(graph: Any) -> None:
    """The tracing exporter writes some sequences (torch.linspace) as float64, which no accelerator and not every runtime computes."""
    for tensor in graph.initializer:
        _narrow(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _narrow(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.DOUBLE:
                attribute.i = TensorProto.FLOAT
    for value in (*graph.value_info, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.DOUBLE:
            value.type.tensor_type.elem_type = TensorProto.FLOAT


def _narrow(tensor: Any) -> None:
    if tensor.data_type == TensorProto.DOUBLE:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
