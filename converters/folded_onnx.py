"""Pre- and post-processing of a detector inside its graph: bytes of pixels in, the best boxes out.

On Jetsons the two took half to two thirds of a detector's time on the CPU; and bytes are a quarter of what float32 planes are to copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from converters.errors import ConversionError
from converters.graph import Graph, read_graph, save_graph
from models.manifest import DetectionManifest

# Part of the engine key: raise it with every change that changes what is written.
VERSION = 1


def is_folded(manifest: object) -> bool:
    return isinstance(manifest, DetectionManifest) and bool(manifest.build.takes_bytes or manifest.build.top_k)


def folded_onnx(source: Path, target: Path, manifest: DetectionManifest) -> Path:
    """Write `target` as `manifest.build` says. What `models/tasks/detection.py` takes of it:

    takes_bytes  the input of pictures is uint8 [N, height, width, 3] in RGB, under its old name
    top_k        instead of `logits`: `scores` float32 [N, k] best first, `labels` int64 [N, k], and `pred_boxes` [N, k, 4] of them

    Raises ConversionError (code `bad_request`) for wishes that do not go together.
    """
    graph = read_graph(source)
    if manifest.build.takes_bytes:
        _take_bytes(graph, manifest)
    if manifest.build.top_k:
        _give_best(graph, manifest)
    return save_graph(graph.model, target)


def _take_bytes(graph: Graph, manifest: DetectionManifest) -> None:
    facts = manifest.detection
    if not facts.has_one_size:
        raise _refused(manifest, f"takes_bytes needs pictures of one size, and resize is {facts.resize!r}")
    name = "images" if facts.contract == "deploy" else "pixel_values"
    value = next(each for each in graph.inputs if each.name == name)
    rows = value.type.tensor_type.shape.dim[0]
    pixels = helper.make_tensor_value_info(name, TensorProto.UINT8, [rows.dim_value or rows.dim_param or "N", facts.height, facts.width, 3])
    value.CopyFrom(pixels)
    floats, planes, scaled = (graph.fresh(f"{name}.{part}") for part in ("floats", "planes", "scaled"))
    mean, std = (np.array(each, np.float64).reshape(1, 3, 1, 1) for each in (facts.mean, facts.std))
    # Divided, not multiplied with the inverse: without mean and std each value is then the very one that the worker would compute.
    divisor = graph.add_constant(f"{name}.divisor", (255 * std).astype(np.float32))
    before = [
        _node("Cast", [name], floats, to=TensorProto.FLOAT),
        _node("Transpose", [floats], planes, perm=[0, 3, 1, 2]),
        _node("Div", [planes, divisor], scaled),
    ]
    if mean.any():
        offset = graph.add_constant(f"{name}.offset", (-mean / std).astype(np.float32))
        scaled = graph.fresh(f"{name}.normal")
        before.append(_node("Add", [before[-1].output[0], offset], scaled))
    for node in graph.readers(name):
        node.input[:] = [scaled if each == name else each for each in node.input]
    graph.replace_nodes([*before, *graph.nodes])


def _give_best(graph: Graph, manifest: DetectionManifest) -> None:
    facts, best = manifest.detection, manifest.build.top_k
    if facts.contract == "deploy":
        raise _refused(manifest, "top_k is for the contract 'raw': a graph of the contract 'deploy' chooses its boxes itself")
    _rename_output(graph, "pred_boxes")
    behind = (
        _best_of_sigmoid(graph, len(facts.labels), best) if facts.scores == "sigmoid" else _best_of_softmax(graph, len(facts.labels), best)
    )
    # Boxes of the chosen queries: [N, k] → [N, k, 1] → [N, k, 4].
    behind += [
        _node("Unsqueeze", ["best.queries", _integers(graph, "best.last", -1)], "best.column"),
        _node("Tile", ["best.column", _integers(graph, "best.repeats", 1, 1, 4)], "best.corners"),
        _node("GatherElements", ["pred_boxes.all", "best.corners"], "pred_boxes", axis=1),
    ]
    rows = graph.inputs[0].type.tensor_type.shape.dim[0].dim_value or "N"
    kinds = {"scores": TensorProto.FLOAT, "labels": TensorProto.INT64, "pred_boxes": TensorProto.FLOAT}
    outputs = [helper.make_tensor_value_info(name, kind, [rows, best, 4][: 2 + (name == "pred_boxes")]) for name, kind in kinds.items()]
    graph.replace_nodes([*graph.nodes, *behind])
    del graph.model.graph.output[:]
    graph.model.graph.output.extend(outputs)
    graph.index()


def _best_of_sigmoid(graph: Graph, classes: int, best: int) -> list[Any]:
    """The best pairs of query and class. The sigmoid rises, so the best logits are the best scores."""
    return [
        _node("Flatten", ["logits"], "best.flat", axis=1),
        helper.make_node(
            "TopK", ["best.flat", _integers(graph, "best.count", best)], ["best.logits", "best.pairs"], name="best/TopK", axis=1
        ),
        _node("Sigmoid", ["best.logits"], "scores"),
        _node("Div", ["best.pairs", _integers(graph, "best.classes", classes)], "best.queries"),
        _node("Mul", ["best.queries", "best.classes"], "best.first"),
        _node("Sub", ["best.pairs", "best.first"], "labels"),
    ]


def _best_of_softmax(graph: Graph, classes: int, best: int) -> list[Any]:
    """The best queries by their likeliest class; the last class is the background."""
    bounds = [_integers(graph, f"best.{name}", value) for name, value in (("begin", 0), ("end", classes), ("axis", 2))]
    return [
        _node("Softmax", ["logits"], "best.shares", axis=-1),
        _node("Slice", ["best.shares", *bounds], "best.objects"),
        _node("ReduceMax", ["best.objects"], "best.each", axes=[2], keepdims=0)
        if graph.opset < 18
        else _node("ReduceMax", ["best.objects", "best.axis"], "best.each", keepdims=0),
        _node("ArgMax", ["best.objects"], "best.classes", axis=2, keepdims=0),
        helper.make_node("TopK", ["best.each", _integers(graph, "best.count", best)], ["scores", "best.queries"], name="best/TopK", axis=1),
        _node("GatherElements", ["best.classes", "best.queries"], "labels", axis=1),
    ]


def _rename_output(graph: Graph, name: str) -> None:
    """Free the name of an output for what is made of it."""
    inner = f"{name}.all"
    for node in graph.nodes:
        node.input[:] = [inner if each == name else each for each in node.input]
        node.output[:] = [inner if each == name else each for each in node.output]


def _integers(graph: Graph, name: str, *values: int) -> str:
    return graph.add_constant(name, np.array(values, np.int64))


def _node(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
    return helper.make_node(operator, list(inputs), [output], name=f"{output}/{operator}", **attributes)


def _refused(manifest: DetectionManifest, what: str) -> ConversionError:
    return ConversionError(f"build of {manifest.name}: {what}; correct its manifest", "bad_request")
