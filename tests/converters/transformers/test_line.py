"""From a saved detector to boxes: manifest, export, optimised graph, our detector, against transformers' own post-processing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tests.models
from converters.manifest_from_transformers import manifest_from_transformers
from converters.onnx_from_onnx import GraphTarget, onnx_from_onnx
from converters.onnx_from_transformers import onnx_from_transformers
from models.engines import EngineOptions, open_engine
from models.manifest import DetectionManifest
from models.pictures import Picture, decode_picture
from models.scaling import Scaler, placement_of
from models.tasks.detection import Detector
from tests.converters.transformers.processors import figures, processor
from tests.converters.transformers.tiny_models import DETECTORS, files_of, save_detector

torch = pytest.importorskip("torch")
# Random weights are sure of little.
THRESHOLD = 0.05
# PIL antialiases when it shrinks, ours takes the four neighbours up to a shrink of two (models/scaling.py says why).
ENLARGED, SHRUNK = 1.01 / 255, 6 / 255


@pytest.fixture(scope="module")
def pictures(test_data: Path) -> list[Picture]:
    files = sorted((test_data / "data" / "coco64").rglob("*.jpg"))[:6]
    return [decode_picture(path.read_bytes()) for path in files]


def prepared(manifest: DetectionManifest, picture: Picture) -> np.ndarray:
    return Scaler(manifest.detection).planes([picture], [placement_of(manifest.detection, *picture.shape[:2])], 1)


# Whose post-processing is published with each family. Those that take the best pairs of query and class take 100 unless told otherwise;
# ours are as many as there are queries, as RT-DETR's.
PROCESSORS = {
    "detr": "Detr",
    "conditional_detr": "ConditionalDetr",
    "dab-detr": "ConditionalDetr",
    "deformable_detr": "DeformableDetr",
    "table-transformer": "Detr",
    "yolos": "Yolos",
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetr",
    "d_fine": "RTDetr",
}
COUNTING = ("ConditionalDetr", "DeformableDetr")


def test_every_family_is_compared() -> None:
    assert set(PROCESSORS) == set(DETECTORS)


@pytest.mark.parametrize("model_type", PROCESSORS)
@pytest.mark.parametrize("is_standard", [False, True], ids=["fused", "standard"])
def test_boxes_are_those_of_transformers(model_type: str, is_standard: bool, tmp_path: Path, pictures: list[Picture]) -> None:
    source, folder, scratch = tmp_path / f"tiny-{model_type}", tmp_path / "engine", tmp_path / "scratch"
    model = save_detector(model_type, source)
    manifest = manifest_from_transformers(source)
    assert isinstance(manifest, DetectionManifest)
    exported = onnx_from_transformers(files_of(source), manifest, tmp_path / "model.onnx", 17, lambda fraction, message: None)
    for each in (folder, scratch):
        each.mkdir()
    onnx_from_onnx(exported, {}, scratch, folder, manifest, GraphTarget(is_standard=is_standard))
    engine = open_engine(folder, EngineOptions(threads=2))
    detector = Detector(engine, manifest)
    post = processor(PROCESSORS[model_type])
    compared = 0
    try:
        for picture in pictures[:3]:
            with torch.no_grad():
                outputs = model(pixel_values=torch.from_numpy(prepared(manifest, picture)))
            most = {"top_k": outputs.logits.shape[1]} if PROCESSORS[model_type] in COUNTING else {}
            expected = post.post_process_object_detection(outputs, threshold=THRESHOLD, target_sizes=[picture.shape[:2]], **most)[0]
            height, width = picture.shape[:2]
            rows = {
                (f"c{int(label)}", round(float(score), 3), *np.clip(box.numpy(), 0, [width, height, width, height]).round().astype(int))
                for label, score, box in zip(expected["labels"], expected["scores"], expected["boxes"], strict=True)
            }
            found = detector.detect(picture, THRESHOLD)
            for box in found:
                near = [
                    row
                    for row in rows
                    if row[0] == box.label
                    and abs(row[1] - box.score) < 2e-3
                    and max(abs(a - b) for a, b in zip(row[2:], (box.x0, box.y0, box.x1, box.y1), strict=True)) <= 1
                ]
                assert near, (box, rows)
            # Ours leaves out boxes that have no area within the picture, and doubles merge in a set.
            assert len(found) >= len({row for row in rows if row[4] > row[2] and row[5] > row[3]}), (found, rows)
            compared += len(found)
    finally:
        engine.close()
    assert compared, "no box passed the threshold: nothing was compared"


@pytest.mark.parametrize(
    ("kind", "facts", "model_type"),
    [
        ("Detr", {"size": {"shortest_edge": 800, "longest_edge": 1333}}, "detr"),
        ("ConditionalDetr", {"size": {"shortest_edge": 800, "longest_edge": 1333}}, "conditional_detr"),
        ("Detr", {"size": {"shortest_edge": 800, "longest_edge": 1000}}, "table-transformer"),
        ("RTDetr", {"size": {"height": 640, "width": 640}, "do_normalize": False}, "rt_detr"),
        ("RTDetr", {"size": {"height": 640, "width": 640}, "do_normalize": False}, "rt_detr_v2"),
        ("RTDetr", {"size": {"height": 320, "width": 320}, "do_normalize": False}, "d_fine"),
    ],
    ids=["detr 800/1333", "conditional-detr 800/1333", "table-transformer 800/1000", "rt-detr 640", "rt-detr-v2 640", "d-fine 320"],
)
def test_pictures_are_prepared_as_transformers_does(
    kind: str, facts: dict[str, Any], model_type: str, tmp_path: Path, pictures: list[Picture]
) -> None:
    save_detector(model_type, tmp_path, size=facts["size"])
    manifest = manifest_from_transformers(tmp_path, "x")
    assert isinstance(manifest, DetectionManifest)
    prepare, std = processor(kind, **facts), np.array(manifest.detection.std).reshape(1, 3, 1, 1)
    means = []
    for picture in pictures:
        ours = prepared(manifest, picture)
        theirs = np.asarray(prepare(images=picture[:, :, ::-1].copy(), return_tensors="np")["pixel_values"])
        assert ours.shape == theirs.shape
        delta = np.abs(ours - theirs) * std
        is_enlarged = ours.shape[2] >= picture.shape[0] and ours.shape[3] >= picture.shape[1]
        means.append(float(delta.mean()))
        assert delta.mean() < (ENLARGED if is_enlarged else SHRUNK)
        if is_enlarged:
            assert np.quantile(delta, 0.999) < 2.01 / 255
    assert max(means) < SHRUNK


def test_the_figures_that_tests_without_torch_use_are_those_of_this_transformers(test_data: Path) -> None:
    pytest.importorskip("transformers")
    written = json.loads((Path(tests.models.__file__).parent / "processors.json").read_text())
    assert figures(test_data) == written
