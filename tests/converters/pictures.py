"""Real pictures for tests of detectors, and how near two graphs of one detector are on them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.catalog import load_catalog
from models.engines import EngineOptions, open_engine
from models.manifest import DetectionManifest
from models.pictures import Picture, decode_picture
from models.tasks.detection import Detection, Detector

BEST = 10


@dataclass(frozen=True)
class Closeness:
    """Share of the first graph's best boxes that the second has too (same label, overlap 0.9), and the deltas of their scores."""

    matched: float
    median: float
    worst: float


def shipped_detector(name: str) -> DetectionManifest:
    manifest = load_catalog().find(name)
    assert isinstance(manifest, DetectionManifest)
    return manifest


def coco_pictures(data: Path, count: int) -> list[Picture]:
    files = sorted((data / "data" / "coco64" / "images").glob("*.jpg"))[:count]
    return [decode_picture(file.read_bytes()) for file in files]


def detections(manifest: DetectionManifest, graph: Path, pictures: Sequence[Picture]) -> list[tuple[Detection, ...]]:
    """All that a graph finds in each picture, best first."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.onnx").symlink_to(graph.absolute())
        engine = open_engine(Path(folder), EngineOptions(threads=2))
        detector = Detector(engine, manifest)
        found = [detector.detect(picture, 0.0) for picture in pictures]
        engine.close()
    return found


def closeness(manifest: DetectionManifest, one: Path, other: Path, pictures: Sequence[Picture]) -> Closeness:
    deltas: list[float] = []
    boxes = 0
    for expected, found in zip(detections(manifest, one, pictures), detections(manifest, other, pictures), strict=True):
        for box in expected[:BEST]:
            boxes += 1
            twins = [abs(twin.score - box.score) for twin in found if twin.label == box.label and overlap(box, twin) >= 0.9]
            deltas.extend([min(twins)] if twins else [])
    return Closeness(len(deltas) / boxes, float(np.median(deltas)), max(deltas))


def overlap(one: Detection, other: Detection) -> float:
    """Intersection over union."""
    width = max(0.0, min(one.x1, other.x1) - max(one.x0, other.x0))
    height = max(0.0, min(one.y1, other.y1) - max(one.y0, other.y0))
    areas = [(box.x1 - box.x0) * (box.y1 - box.y0) for box in (one, other)]
    return width * height / (sum(areas) - width * height)
