from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from converters.errors import ConversionError
from converters.folded_onnx import folded_onnx
from converters.half_from_onnx import half_from_onnx
from converters.onnx_from_onnx import ONNXRUNTIME, GraphTarget, onnx_from_onnx
from models.manifest import Build, DetectionManifest
from tests.converters.manifests import detection_manifest
from tests.converters.pictures import coco_pictures, detections, shipped_detector
from tests.converters.rtx import plan_bytes
from tests.converters.test_standard_graph import RTX
from tests.converters.tiny_onnx import detector, save

SMOOTH = [np.random.default_rng(5).integers(0, 255, (40, 60, 3)).astype(np.uint8)]


def engine(source: Path, folder: Path, manifest: DetectionManifest, target: GraphTarget) -> Path:
    for name in ("scratch", "engine"):
        (folder / name).mkdir(parents=True)
    onnx_from_onnx(source, {}, folder / "scratch", folder / "engine", manifest, target)
    return folder / "engine" / "model.onnx"


def assert_same(manifest: DetectionManifest, one: Path, other: Path, pictures: list[np.ndarray], best: int) -> None:
    for expected, found in zip(detections(manifest, one, pictures), detections(manifest, other, pictures), strict=True):
        assert len(found) == min(best, len(expected))
        for box, twin in zip(expected, found, strict=False):
            assert box.label == twin.label
            assert abs(box.score - twin.score) < 1e-5
            assert max(abs(getattr(box, side) - getattr(twin, side)) for side in ("x0", "y0", "x1", "y1")) < 0.05


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize("target", [ONNXRUNTIME, RTX], ids=["onnxruntime", "tensorrt"])
def test_the_same_boxes_from_bytes_and_among_the_best(tmp_path: Path, scores: str, target: GraphTarget) -> None:
    labels = ["a", "b", "c"] if scores == "sigmoid" else ["a", "b"]
    manifest = detection_manifest(scores=scores, labels=labels, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    source = save(tmp_path / "m.onnx", detector())
    folded = engine(source, tmp_path / "folded", replace(manifest, build=Build(takes_bytes=True, top_k=5)), target)
    graph = onnx.load(str(folded)).graph
    assert [size.dim_value for size in graph.input[0].type.tensor_type.shape.dim][1:] == [32, 48, 3]
    assert {value.name for value in graph.output} == {"scores", "labels", "pred_boxes"}
    assert_same(manifest, source, folded, SMOOTH, 5)


def test_a_real_detector_folded_and_halved(tmp_path: Path, test_data: Path) -> None:
    manifest = shipped_detector("deimv2-femto")
    source = test_data / "models" / "deimv2_hgnetv2_femto_coco_raw.onnx"
    plain = engine(source, tmp_path / "plain", manifest, RTX)
    folded = engine(source, tmp_path / "folded", replace(manifest, build=Build(takes_bytes=True, top_k=100)), RTX)
    assert_same(manifest, plain, folded, coco_pictures(test_data, 8), 100)
    half_from_onnx(folded, tmp_path / "half.onnx")
    assert plan_bytes(tmp_path / "half.onnx") > 1_000_000


def test_wishes_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "m.onnx", detector())
    for facts, build, words in (
        ({"resize": "shortest_edge"}, Build(takes_bytes=True), "takes_bytes needs pictures of one size"),
        ({"contract": "deploy"}, Build(top_k=5), "chooses its boxes itself"),
    ):
        with pytest.raises(ConversionError, match=words):
            folded_onnx(source, tmp_path / "out.onnx", replace(detection_manifest(**facts), build=build))
