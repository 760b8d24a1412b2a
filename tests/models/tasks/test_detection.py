"""Detection on real weights: both contracts, accuracy against the bare model, and the arithmetic around it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from bench.average_precision import Found, Truth, mean_average_precision
from models import manifest
from models.engines import EngineError, EngineOptions, TensorSpec, open_engine
from models.pictures import decode_picture
from models.scaling import Placement
from models.tasks.detection import Detector, from_deploy, from_raw


class Answer:
    """An engine that returns given outputs."""

    provider = "cpu"
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, **outputs: Sequence[object]) -> None:
        self._outputs = {name: np.asarray(value) for name, value in outputs.items()}

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        return dict(self._outputs)

    def close(self) -> None: ...


def stretched(height: int, width: int) -> Placement:
    return Placement((height, width), (8, 8), (8, 8))


def coco_labels(folder: Path) -> tuple[str, ...]:
    categories = json.loads((folder / "data/coco64/instances.json").read_text())["categories"]
    return tuple(each["name"] for each in sorted(categories, key=lambda each: int(each["id"])))


def deimv2(folder: Path, tmp_path: Path, file: str, facts: manifest.Detection, batch_max: int = 1) -> Detector:
    home = tmp_path / file
    home.mkdir()
    (home / "model.onnx").symlink_to(folder / "models" / file)
    model = manifest.DetectionManifest(
        "deimv2-femto", "Apache-2.0", "", "onnx", {}, build=manifest.Build(batch_max=batch_max), detection=facts
    )
    return Detector(open_engine(home, EngineOptions(threads=2)), model)


def femto(folder: Path, tmp_path: Path) -> Detector:
    return deimv2(folder, tmp_path, "deimv2_hgnetv2_femto_coco_raw.onnx", manifest.Detection(416, 416, coco_labels(folder)))


def test_two_cats_and_a_remote_by_both_contracts(test_data: Path, tmp_path: Path) -> None:
    picture = decode_picture((test_data / "data/two_cats.png").read_bytes())
    deploy = manifest.Detection(416, 416, coco_labels(test_data), "deploy")
    raw_found = femto(test_data, tmp_path).detect(picture)
    deploy_found = deimv2(test_data, tmp_path, "deimv2_hgnetv2_femto_coco.onnx", deploy).detect(picture)
    labels = [each.label for each in raw_found]
    assert labels.count("cat") == 2
    assert labels.count("remote") >= 1
    left, right = sorted((each for each in raw_found if each.label == "cat"), key=lambda each: each.x0)
    assert left.x1 < 330 < right.x0 + 20
    assert labels == [each.label for each in deploy_found]
    for one, other in zip(raw_found, deploy_found):
        assert one.score == pytest.approx(other.score, abs=1e-5)
        assert (one.x0, one.y0, one.x1, one.y1) == pytest.approx((other.x0, other.y0, other.x1, other.y1), abs=0.01)


def test_accuracy_is_that_of_the_bare_model(test_data: Path, tmp_path: Path) -> None:
    """mAP on the 64 pictures within 0.003 of the same ONNX with the steps written out plainly."""
    described = json.loads((test_data / "data/coco64/instances.json").read_text())
    names = {each["id"]: each["name"] for each in described["categories"]}
    truth: dict[int, list[Truth]] = {each["id"]: [] for each in described["images"]}
    for each in described["annotations"]:
        x, y, width, height = each["bbox"]
        truth[each["image_id"]].append(Truth(names[each["category_id"]], (x, y, x + width, y + height), bool(each["iscrowd"])))
    detector, labels = femto(test_data, tmp_path), coco_labels(test_data)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    bare = onnxruntime.InferenceSession(
        str(test_data / "models/deimv2_hgnetv2_femto_coco_raw.onnx"), options, providers=["CPUExecutionProvider"]
    )
    ours: dict[int, list[Found]] = {}
    direct: dict[int, list[Found]] = {}
    for each in described["images"]:
        data = (test_data / "data/coco64/images" / each["file_name"]).read_bytes()
        found = detector.detect(decode_picture(data), 0.0)
        ours[each["id"]] = [Found(one.label, one.score, (one.x0, one.y0, one.x1, one.y1)) for one in found]
        direct[each["id"]] = run_bare(bare, data, labels)
    expected, got = mean_average_precision(truth, direct), mean_average_precision(truth, ours)
    assert expected > 0.39
    assert got == pytest.approx(expected, abs=0.003)


def run_bare(session: onnxruntime.InferenceSession, data: bytes, labels: Sequence[str]) -> list[Found]:
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    picture = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
    height, width = picture.shape[:2]
    planes = (cv2.resize(picture, (416, 416)).astype(np.float32) / 255).transpose(2, 0, 1)[None]
    logits, boxes = session.run(["logits", "pred_boxes"], {"pixel_values": planes})
    scores = 1 / (1 + np.exp(-logits[0]))
    best = np.argsort(-scores, axis=None)[:100]
    found = []
    for query, label in zip(*np.unravel_index(best, scores.shape)):
        x, y, w, h = boxes[0, query] * (width, height, width, height)
        found.append(Found(labels[label], float(scores[query, label]), (x - w / 2, y - h / 2, x + w / 2, y + h / 2)))
    return found


def test_the_evaluator_knows_right_from_wrong() -> None:
    truth = {1: [Truth("cat", (0, 0, 10, 10)), Truth("cat", (20, 0, 30, 10))], 2: [Truth("dog", (0, 0, 10, 10))]}
    cats = [Found("cat", 0.9, (0, 0, 10, 10)), Found("cat", 0.8, (20, 0, 30, 10))]
    assert mean_average_precision(truth, {1: cats, 2: [Found("dog", 0.5, (0, 0, 10, 10))]}) == pytest.approx(1.0)
    assert mean_average_precision(truth, {1: cats}) == pytest.approx(0.5)
    assert mean_average_precision(truth, {1: cats[:1]}) == pytest.approx(51 / 101 / 2)
    # IoU 0.9 is right at nine of the ten thresholds; precision counts from the best score down.
    assert mean_average_precision({1: truth[2]}, {1: [Found("dog", 0.5, (0, 0, 10, 9))]}) == pytest.approx(0.9)


def test_sigmoid_keeps_pairs_of_query_and_class_up_to_the_number_of_queries() -> None:
    logits = np.array([[[2.0, 1.0, -9.0], [-9.0, -9.0, 0.0]]], np.float32)
    boxes = np.array([[[0.5, 0.5, 0.2, 0.4], [0.9, 0.9, 0.4, 0.4]]], np.float32)
    facts = manifest.Detection(8, 8, ("a", "b", "c"))
    found = from_raw({"logits": logits, "pred_boxes": boxes}, facts, stretched(100, 200), 0.4)
    assert [(each.label, round(each.score, 4)) for each in found] == [("a", 0.8808), ("b", 0.7311)]
    assert (found[0].x0, found[0].y0, found[0].x1, found[0].y1) == pytest.approx((80, 30, 120, 70))
    (clipped,) = from_raw({"logits": logits[:, 1:], "pred_boxes": boxes[:, 1:]}, facts, stretched(100, 200), 0.4)
    assert (clipped.x0, clipped.y0, clipped.x1, clipped.y1) == pytest.approx((140, 70, 200, 100))
    assert from_raw({"logits": logits, "pred_boxes": boxes}, facts, stretched(100, 200), 1.0) == ()


def test_softmax_leaves_the_background_out() -> None:
    logits = np.array([[[3.0, 0.0, 1.0], [0.0, 1.0, 5.0]]], np.float32)
    boxes = np.full((1, 2, 4), 0.5, np.float32)
    facts = manifest.Detection(8, 8, ("cat", "dog"), scores="softmax")
    (found,) = from_raw({"logits": logits, "pred_boxes": boxes}, facts, stretched(10, 10), 0.5)
    assert found.label == "cat"
    assert found.score == pytest.approx(math.exp(3) / (math.exp(3) + 1 + math.e), rel=1e-5)


def test_deploy_drops_what_is_weak_or_has_no_area() -> None:
    outputs = {
        "labels": np.array([[1, 0, 0]]),
        "boxes": np.array([[[-5, 2, 8, 9], [1, 1, 1, 5], [0, 0, 4, 4]]], np.float32),
        "scores": np.array([[0.7, 0.9, 0.1]], np.float32),
    }
    (found,) = from_deploy(outputs, manifest.Detection(8, 8, ("a", "b"), "deploy"), stretched(10, 10), 0.5)
    assert (found.label, found.x0, found.y0, found.x1, found.y1) == ("b", 0.0, 2.0, 8.0, 9.0)


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({"logits": [[[float("nan"), 0.0]]], "pred_boxes": [[[0.5, 0.5, 0.1, 0.1]]]}, "not-a-number"),
        ({"logits": [[[1.0, 0.0, 0.0]]], "pred_boxes": [[[0.5, 0.5, 0.1, 0.1]]]}, "3 classes"),
        ({"scores": [[1.0]]}, "contract 'raw'"),
    ],
)
def test_outputs_that_do_not_fit_are_an_error_not_an_empty_scene(outputs: Mapping[str, Sequence[object]], words: str) -> None:
    model = manifest.DetectionManifest("m", "MIT", "", "onnx", {}, detection=manifest.Detection(8, 8, ("a", "b")))
    with pytest.raises(EngineError, match=words):
        Detector(Answer(**outputs), model).detect(np.zeros((4, 4, 3), np.uint8))


def test_many_pictures_are_found_in_as_each_alone(test_data: Path, tmp_path: Path) -> None:
    files = sorted((test_data / "data/coco64/images").glob("*.jpg"))[:5]
    pictures = [decode_picture(file.read_bytes()) for file in files]
    facts = manifest.Detection(416, 416, coco_labels(test_data))
    detector = deimv2(test_data, tmp_path, "deimv2_hgnetv2_femto_coco_raw.onnx", facts, batch_max=2)
    assert detector.batch_max == 2
    alone = [detector.detect(picture, 0.3) for picture in pictures]
    together = detector.detect_many(pictures, 0.3)
    assert sum(map(len, alone)) > 5
    for one, other in zip(alone, together):
        assert [each.label for each in one] == [each.label for each in other]
        for first, second in zip(one, other):
            assert first.score == pytest.approx(second.score, abs=1e-5)
            assert (first.x0, first.y1) == pytest.approx((second.x0, second.y1), abs=0.01)
    with pytest.raises(ValueError, match="1 to 2 pictures of one input size"):
        detector.prepare(pictures[:3])


def test_boxes_of_a_letterbox_lie_where_they_are_in_the_picture() -> None:
    """A picture of 100x50 fills the upper half of 64x64."""
    facts = manifest.Detection(64, 64, ("a", "b"), resize="letterbox")
    model = manifest.DetectionManifest("m", "MIT", "", "onnx", {}, detection=facts)
    answer = Answer(logits=[[[9.0, -9.0], [-9.0, 8.0]]], pred_boxes=[[[0.5, 0.25, 1.0, 0.5], [0.25, 0.5, 0.1, 0.5]]])
    whole, cut = Detector(answer, model).detect(np.zeros((50, 100, 3), np.uint8))
    assert (whole.x0, whole.y0, whole.x1, whole.y1) == pytest.approx((0, 0, 100, 50))
    assert (cut.x0, cut.y0, cut.x1, cut.y1) == pytest.approx((20, 25, 30, 50))


def test_a_graph_of_one_fixed_batch_is_filled_up() -> None:
    facts = manifest.Detection(8, 8, ("a",))
    model = manifest.DetectionManifest("m", "MIT", "", "onnx", {}, detection=facts)
    answer = Answer(logits=[[[9.0]], [[9.0]], [[9.0]]], pred_boxes=[[[0.5, 0.5, 1, 1]], [[0.5, 0.5, 0.5, 0.5]], [[0.5, 0.5, 1, 1]]])
    answer.inputs = (TensorSpec("pixel_values", "float32", (3, 3, 8, 8)),)
    detector = Detector(answer, model)
    prepared = detector.prepare([np.zeros((8, 8, 3), np.uint8)] * 2)
    assert prepared.inputs["pixel_values"].shape == (3, 3, 8, 8)
    assert [(one.x0, one.x1) for (one,) in detector.detect_many([np.zeros((8, 8, 3), np.uint8)] * 4)] == [(0, 8), (2, 6), (0, 8), (0, 8)]
