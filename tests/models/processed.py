"""Pictures and settings on which our pre-processing is held against transformers' image processors, and the figures that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from models.manifest import Detection
from models.pictures import Picture, decode_picture

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
ROWS, COLUMNS, POINTS = 4, 5, 16


@dataclass(frozen=True)
class Case:
    """A class of transformers with its settings, and our manifest's words for them."""

    kind: str
    processor: dict[str, Any]
    facts: Detection


def _edges(kind: str, short: int, long: int, multiple_of: int = 1) -> Case:
    size = {"size": {"shortest_edge": short, "longest_edge": long}}
    return Case(kind, size, Detection(short, long, ("a",), resize="shortest_edge", multiple_of=multiple_of, **IMAGENET))


CASES = {
    "detr": _edges("Detr", 800, 1333),
    "table transformer": _edges("Detr", 800, 1000),
    "conditional detr": _edges("ConditionalDetr", 800, 1333),
    "deformable detr": _edges("DeformableDetr", 800, 1333),
    "yolos": _edges("Yolos", 512, 864, 16),
    "lw-detr": Case("DeformableDetr", {"size": {"height": 640, "width": 640}}, Detection(640, 640, ("a",), **IMAGENET)),
    # The processor of RT-DETR, RT-DETRv2, D-FINE and DEIMv2.
    "rt-detr": Case("RTDetr", {"size": {"height": 640, "width": 640}, "do_normalize": False}, Detection(640, 640, ("a",))),
    "deimv2 nano": Case("RTDetr", {"size": {"height": 416, "width": 416}, "do_normalize": False}, Detection(416, 416, ("a",))),
    "deimv2 of dinov3": Case(
        "RTDetr",
        {"size": {"height": 640, "width": 640}, "do_normalize": True, "image_mean": IMAGENET["mean"], "image_std": IMAGENET["std"]},
        Detection(640, 640, ("a",), **IMAGENET),
    ),
}


@lru_cache(maxsize=1)
def pictures(data: Path) -> dict[str, Picture]:
    cats = decode_picture((data / "data/two_cats.png").read_bytes())
    portrait = decode_picture((data / "data/coco64/images/000000000776.jpg").read_bytes())
    return {
        "landscape": cats,
        "portrait": portrait,
        "camera": np.asarray(cv2.resize(portrait, (1280, 960), interpolation=cv2.INTER_CUBIC), np.uint8),
        "panorama": np.ascontiguousarray(cats[200:264]),
    }


def digest(planes: NDArray[np.float32], facts: Detection) -> dict[str, Any]:
    """Shape, means of a grid and single points of [1,3,height,width], in tenths of a byte's step before the normalisation."""
    bytes_ = (planes[0].astype(np.float64) * np.reshape(facts.std, (3, 1, 1)) + np.reshape(facts.mean, (3, 1, 1))) * 255
    height, width = bytes_.shape[1:]
    rows, columns = (np.linspace(0, side, count + 1).astype(int) for side, count in ((height, ROWS), (width, COLUMNS)))
    grid = [bytes_[:, a:b, c:d].mean(axis=(1, 2)) for a, b in zip(rows, rows[1:]) for c, d in zip(columns, columns[1:])]
    places = np.random.default_rng(1).random((POINTS, 2))
    points = [bytes_[:, int(y * height), int(x * width)] for y, x in places]
    return {"shape": list(planes.shape), "grid": _tenths(grid), "points": _tenths(points)}


def _tenths(values: list[NDArray[np.float64]]) -> list[int]:
    return [round(float(value) * 10) for value in np.concatenate(values)]
