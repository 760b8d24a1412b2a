"""Boxes of chosen candidates only: the same boxes, from fewer rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from converters.chosen_first import chosen_first
from tests.converters.tiny_onnx import model

PLACES, WIDTH, BEST = 20, 8, 5


def proposals(anchor_rows: int = 1, takes_features: bool = True, gives_all: bool = False) -> Any:
    """features [N,20,8] → the boxes [N,5,4] and features [N,5,8] of the best five places, as transformers writes RT-DETR."""
    rng = np.random.default_rng(4)
    weights = {
        "to_scores": rng.standard_normal((WIDTH, 3)).astype(np.float32),
        "first": rng.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "first_bias": rng.standard_normal(WIDTH).astype(np.float32),
        "second": rng.standard_normal((WIDTH, 4)).astype(np.float32),
        "anchors": rng.standard_normal((anchor_rows, PLACES, 4)).astype(np.float32),
        "best": np.array([BEST], np.int64), "last": np.array([-1], np.int64), "two": np.array(2, np.int64), "axis": np.array([0], np.int64),
        "four": np.array([1, 1, 4], np.int64), "eight": np.array([1, 1, WIDTH], np.int64), "ones": np.array([1, 1], np.int64),
    }  # fmt: skip
    nodes = [
        helper.make_node("Identity", ["given"], ["features"]),
        helper.make_node("MatMul", ["features", "to_scores"], ["scores"]),
        helper.make_node("ReduceMax", ["scores"], ["sure"], axes=[2], keepdims=0),
        helper.make_node("TopK", ["sure", "best"], ["top", "places"], axis=1),
        helper.make_node("MatMul", ["features", "first"], ["a"]),
        helper.make_node("Add", ["a", "first_bias"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "second"], ["d"]),
        helper.make_node("Add", ["d", "anchors"], ["all_boxes"]),
        helper.make_node("Unsqueeze", ["places", "last"], ["column"]),
        helper.make_node("Shape", ["all_boxes"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "two"], ["size"], axis=0),
        helper.make_node("Unsqueeze", ["size", "axis"], ["sizes_of_one"]),
        helper.make_node("Concat", ["ones", "sizes_of_one"], ["repeats"], axis=0),
        helper.make_node("Tile", ["column", "repeats"], ["box_places"]),
        helper.make_node("GatherElements", ["all_boxes", "box_places"], ["boxes"], axis=1),
        helper.make_node("Tile", ["column", "eight"], ["feature_places"]),
        helper.make_node("GatherElements", ["features" if takes_features else "scaled", "feature_places"], ["chosen"], axis=1),
    ]
    if not takes_features:
        nodes.insert(1, helper.make_node("Neg", ["features"], ["scaled"]))
    outputs: dict[str, tuple[int, list[Any]]] = {
        "boxes": (TensorProto.FLOAT, ["N", BEST, 4]),
        "chosen": (TensorProto.FLOAT, ["N", BEST, WIDTH]),
    }
    if gives_all:
        outputs["all_boxes"] = (TensorProto.FLOAT, ["N", PLACES, 4])
    return model(nodes, {"given": (TensorProto.FLOAT, ["N", PLACES, WIDTH])}, outputs, weights)


def run(path: Path) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    features = np.random.default_rng(5).standard_normal((3, PLACES, WIDTH)).astype(np.float32)
    return [np.asarray(each) for each in session.run(["boxes", "chosen"], {"given": features})]


@pytest.mark.parametrize("anchor_rows", [1, 3])
def test_boxes_are_the_same_and_computed_for_the_chosen_only(anchor_rows: int, tmp_path: Path) -> None:
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    onnx.save(proposals(anchor_rows), str(source))
    assert chosen_first(source, target)
    onnx.checker.check_model(str(target), full_check=True)
    for one, other in zip(run(source), run(target), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)
    graph = onnx.load(str(target)).graph
    first = next(node for node in graph.node if "first" in node.input)
    assert first.input[0] == "chosen"
    assert not any("all_boxes" in [*node.input, *node.output] for node in graph.node)


@pytest.mark.parametrize("facts", [{"takes_features": False}, {"gives_all": True}])
def test_other_graphs_are_left_alone(facts: dict[str, bool], tmp_path: Path) -> None:
    onnx.save(proposals(**facts), str(tmp_path / "source.onnx"))
    assert not chosen_first(tmp_path / "source.onnx", tmp_path / "target.onnx")
    assert not (tmp_path / "target.onnx").exists()
