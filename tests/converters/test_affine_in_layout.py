"""Scale and shift behind convolutions: the same numbers from fewer passes over the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from converters.affine_in_layout import affine_in_layout
from converters.onnx_from_onnx import onnx_from_onnx
from models.manifest import Detection, DetectionManifest
from tests.converters.tiny_onnx import model

SHAPE = [1, 3, 24, 20]


def chain(*behind: Any, channels: int = 16, scale: tuple[int, ...] = (1,)) -> Any:
    """picture → Conv → Relu → the given nodes → Conv."""
    rng = np.random.default_rng(1)
    weights = {
        "first": rng.standard_normal((channels, 3, 3, 3)).astype(np.float32),
        "second": rng.standard_normal((8, channels, 3, 3)).astype(np.float32),
        "scale": rng.standard_normal(scale).astype(np.float32),
        "shift": np.array(0.25, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["picture", "first"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["features"], ["active"]),
        *behind,
        helper.make_node("Conv", ["shifted", "second"], ["out"], pads=[1, 1, 1, 1]),
    ]
    return model(nodes, {"picture": (TensorProto.FLOAT, SHAPE)}, {"out": (TensorProto.FLOAT, ["N", 8, "H", "W"])}, weights)


def run(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    picture = np.random.default_rng(2).random(SHAPE, np.float32)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: picture})[0])


PAIR = (helper.make_node("Mul", ["scale", "active"], ["scaled"]), helper.make_node("Add", ["scaled", "shift"], ["shifted"]))
OTHER_WAY_ROUND = (helper.make_node("Mul", ["active", "scale"], ["scaled"]), helper.make_node("Add", ["shift", "scaled"], ["shifted"]))
TWICE_READ = (*PAIR[:1], helper.make_node("Add", ["scaled", "scaled"], ["shifted"]))
ELSEWHERE = (
    helper.make_node("Identity", ["active"], ["same"]), helper.make_node("Mul", ["same", "scale"], ["scaled"]),
    helper.make_node("Add", ["scaled", "shift"], ["shifted"]),
)  # fmt: skip


@pytest.mark.parametrize(
    ("graph", "pairs"),
    [(chain(*PAIR), 1), (chain(*OTHER_WAY_ROUND, scale=()), 1), (chain(*PAIR, scale=(1, 1, 1, 1)), 1),
     (chain(*PAIR, scale=(1, 16, 1, 1)), 0), (chain(*TWICE_READ), 0), (chain(*ELSEWHERE), 0)],
    ids=["pair", "other way round", "four dimensions", "a number per channel", "no shift", "not behind a convolution"],
)  # fmt: skip
def test_pairs_become_one_step_and_the_numbers_stay(graph: Any, pairs: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(graph, str(path))
    before = run(path)
    assert affine_in_layout(path) == pairs
    written = onnx.load(str(path))
    onnx.checker.check_model(written)
    assert [node.op_type for node in written.graph.node].count("BatchNormalization") == pairs
    np.testing.assert_allclose(run(path), before, rtol=1e-5, atol=1e-5)
    assert affine_in_layout(path) == 0


def test_the_backbone_of_deimv2_is_computed_as_before(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "models/deimv2_hgnetv2_femto_coco_raw.onnx"
    manifest = DetectionManifest("femto", "Apache-2.0", "", "onnx", {}, detection=Detection(416, 416, ("a",) * 80))
    for folder in ("scratch", "engine"):
        (tmp_path / folder).mkdir()
    onnx_from_onnx(source, {}, tmp_path / "scratch", tmp_path / "engine", manifest)
    graph = onnx.load(str(tmp_path / "engine/model.onnx")).graph
    assert [node.op_type for node in graph.node].count("BatchNormalization") == 20
    feed = {"pixel_values": np.random.default_rng(3).random((1, 3, 416, 416), np.float32)}
    plain, ours = (
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(["logits", "pred_boxes"], feed)
        for path in (source, tmp_path / "engine/model.onnx")
    )
    for one, other in zip(plain, ours, strict=True):
        np.testing.assert_allclose(other, one, atol=2e-3)
