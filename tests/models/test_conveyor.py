"""The rendered belt is a function of seed and time, its truth is consistent, and the shipped detector sees it."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

import models
from models.conveyor import Box, Conveyor
from models.conveyor_sprites import LABELS
from models.engines import Engine, EngineOptions, open_engine
from models.manifest import DetectionManifest, manifest_from_mapping
from models.tasks.detection import Detection, Detector

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(models.__file__).parent
WEIGHTS = PACKAGE / "weights" / "conveyor_detr.onnx"
FORBIDDEN = {"GridSample", "LayerNormalization", "NonZero", "NonMaxSuppression", "Shape", "If", "Loop"}
TILES = [
    [96.47, 98.47, 101.10, 100.89, 96.20],
    [86.23, 95.29, 93.89, 93.70, 87.33],
    [93.70, 96.78, 120.15, 98.90, 94.03],
]


@pytest.fixture(scope="module")
def manifest() -> DetectionManifest:
    parsed = manifest_from_mapping(tomllib.loads((PACKAGE / "manifests" / "conveyor-detr.toml").read_text("utf-8")))
    if not isinstance(parsed, DetectionManifest):
        pytest.fail(f"conveyor-detr is a {parsed.task} manifest")
    return parsed


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("conveyor")
    shutil.copy(WEIGHTS, folder / "model.onnx")
    opened = open_engine(folder, EngineOptions(threads=1))
    yield opened
    opened.close()


def test_a_picture_depends_on_seed_and_time_alone() -> None:
    straight, jumping = Conveyor(5), Conveyor(5)
    for t_s in (200.0, 0.0, 77.7):
        jumping.frame(t_s)
        jumping.crossed(t_s)
    for t_s in (0.0, 12.34, 77.7):
        assert np.array_equal(straight.frame(t_s), jumping.frame(t_s))
        assert straight.truth(t_s) == jumping.truth(t_s)
        assert straight.crossed(t_s) == jumping.crossed(t_s)
    assert not np.array_equal(straight.frame(3.0), Conveyor(6).frame(3.0))
    assert straight.frame(3.0).shape == (360, 640, 3)


def test_the_picture_is_the_same_everywhere() -> None:
    # Another picture than this means that recorded counts and the shipped weights belong to another world: train again.
    # Means of 120 x 128 pixels, for sine and exponential differ in the last bit from processor to processor.
    tiles = Conveyor(3).frame(5.5).reshape(3, 120, 5, 128, 3).mean(axis=(1, 3, 4))
    assert np.allclose(tiles, TILES, atol=0.1)


def test_the_picture_keeps_clear_of_black_and_white() -> None:
    # Noise is added modulo 256; a pixel near an end would flip to the other one.
    for seed in range(5):
        for t_s in (11.0, 130.0):
            picture = Conveyor(seed).frame(t_s)
            assert picture.min() > 2
            assert picture.max() < 253


@pytest.mark.parametrize("width,height,speed_px_s", [(640, 360, 110.0), (1280, 720, 220.0), (320, 180, 30.0)])
def test_counts_follow_from_the_truth_of_each_picture(width: int, height: int, speed_px_s: float) -> None:
    belt = Conveyor(11, width, height, speed_px_s)
    rate_hz, seconds = 10, 90
    before: set[int] = {box.object_id for box in belt.truth(0.0) if _middle(box) >= width / 2}
    crossed: Counter[str] = Counter()
    for number in range(1, seconds * rate_hz + 1):
        for box in belt.truth(number / rate_hz):
            if _middle(box) >= width / 2 and box.object_id not in before:
                before.add(box.object_id)
                crossed[box.label] += 1
        if number % 100 == 0:
            assert belt.crossed(number / rate_hz) == {label: crossed[label] for label in LABELS}
    assert belt.crossed(0.0) == dict.fromkeys(LABELS, 0)


def test_a_minute_brings_enough_of_each_kind() -> None:
    for seed in range(8):
        counts = Conveyor(seed).crossed(60.0)
        assert 35 <= sum(counts.values()) <= 62
        assert min(counts.values()) >= 5


def test_objects_touch_but_do_not_hide_each_other() -> None:
    belt = Conveyor(2)
    for t_s in np.arange(0, 120, 0.5):
        boxes = belt.truth(float(t_s))
        for one, box in enumerate(boxes):
            assert belt.height * 0.13 <= box.y0 < box.y1 <= belt.height * 0.88
            for other in boxes[one + 1 :]:
                assert min(box.x1, other.x1) - max(box.x0, other.x0) <= 3 or min(box.y1, other.y1) - max(box.y0, other.y0) <= 3


@pytest.mark.parametrize("t_s", [-0.1, float("nan"), float("inf")])
def test_a_time_outside_the_run_is_refused(t_s: float) -> None:
    with pytest.raises(ValueError, match="t_s"):
        Conveyor(0).frame(t_s)


def test_the_truth_lies_where_the_picture_changes() -> None:
    """Independent of the drawing: the belt differs from an empty one inside a box, and does not a little outside of it."""
    belt, empty = Conveyor(4), Conveyor(4)
    empty._block = lambda block: ()  # type: ignore[method-assign]  # the same belt and noise with nothing on it
    for t_s in (10.0, 21.0, 33.0):
        change = np.abs(belt.frame(t_s).astype(np.int16) - empty.frame(t_s)).max(axis=-1) > 12
        boxes = [box for box in belt.truth(t_s) if box.x0 > 0 and box.x1 < belt.width]
        assert boxes
        for box in boxes:
            inside = change[round(box.y0) : round(box.y1), round(box.x0) : round(box.x1)]
            assert inside.mean() > 0.35
            # Shadows fall to the lower right, so the sharp edges are the upper and the left one.
            assert inside[:3].any()
            assert inside[:, :3].any()


def test_the_shipped_detector_finds_what_is_there(engine: Engine, manifest: DetectionManifest) -> None:
    detector = Detector(engine, manifest)
    truth_count = found_count = hit_count = 0
    for seed in range(8):
        belt = Conveyor(seed)
        for t_s in (4.0, 19.0, 42.0, 95.0, 260.0):
            truth = [box for box in belt.truth(t_s) if _is_central(_middle(box), belt)]
            found = [each for each in detector.detect(belt.frame(t_s)) if _is_central((each.x0 + each.x1) / 2, belt)]
            truth_count, found_count = truth_count + len(truth), found_count + len(found)
            hit_count += _hits(found, belt.truth(t_s))
    assert truth_count > 120
    assert hit_count / truth_count >= 0.97
    assert hit_count / found_count >= 0.97


def test_the_shipped_detector_keeps_its_contract(engine: Engine, manifest: DetectionManifest) -> None:
    assert [(spec.name, spec.dtype, spec.shape) for spec in engine.inputs] == [("pixel_values", "float32", (-1, 3, 192, 320))]
    assert [(spec.name, spec.shape) for spec in engine.outputs] == [("logits", (-1, 24, 3)), ("pred_boxes", (-1, 24, 4))]
    assert manifest.detection.labels == LABELS
    pictures = np.random.RandomState(0).rand(3, 3, 192, 320).astype(np.float32)
    together = {name: value.copy() for name, value in engine.run({"pixel_values": pictures}).items()}
    alone = engine.run({"pixel_values": pictures[1:2]})
    for name, value in together.items():
        assert value.shape[0] == 3
        assert np.allclose(value[1], alone[name][0], atol=1e-3)
    boxes = together["pred_boxes"]
    assert boxes.min() >= 0
    assert boxes.max() <= 1


def test_the_shipped_file_is_small_pinned_and_fit_for_old_parsers(manifest: DetectionManifest) -> None:
    content = WEIGHTS.read_bytes()
    (file,) = manifest.files.values()
    assert file.source == f"shipped:{WEIGHTS.relative_to(PACKAGE).as_posix()}"
    assert file.size_bytes == len(content) <= 1_500_000
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    model = onnx.load(str(WEIGHTS))
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)]
    assert not FORBIDDEN & {node.op_type for node in model.graph.node}


def _middle(box: Box) -> float:
    return (box.x0 + box.x1) / 2


def _is_central(x: float, belt: Conveyor) -> bool:
    return 0.1 < x / belt.width < 0.9


def _hits(found: list[Detection], truth: tuple[Box, ...]) -> int:
    free: dict[int, Box] = {box.object_id: box for box in truth}
    hits = 0
    for each in found:
        fits = [key for key, box in free.items() if box.label == each.label and _iou(each, box) >= 0.5]
        if fits:
            del free[fits[0]]
            hits += 1
    return hits


def _iou(one: Detection, other: Box) -> float:
    shared = max(0.0, min(one.x1, other.x1) - max(one.x0, other.x0)) * max(0.0, min(one.y1, other.y1) - max(one.y0, other.y0))
    return shared / ((one.x1 - one.x0) * (one.y1 - one.y0) + (other.x1 - other.x0) * (other.y1 - other.y0) - shared)
