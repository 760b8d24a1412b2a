"""Object detection with the DETR family: a picture in, boxes in its pixels out. Pure functions around one run of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from models import manifest
from models.engines import Engine, EngineError
from models.pictures import Picture, pixels_of, planes_of


@dataclass(frozen=True)
class Detection:
    """One object: upper left corner (x0, y0) and lower right corner (x1, y1) in pixels, within the picture."""

    label: str
    score: float
    x0: float
    y0: float
    x1: float
    y1: float


class Detector:
    """A detection model ready for pictures. Belongs to the engine's thread; the engine stays the caller's to close."""

    def __init__(self, engine: Engine, model: manifest.DetectionManifest) -> None:
        self.name = model.name
        self.facts = model.detection
        self._engine = engine
        self._tables = channel_tables(self.facts)
        self._takes_bytes = any(spec.dtype == "uint8" for spec in engine.inputs)
        self._planes: Optional[NDArray[np.float32]] = None
        self._pixels: Optional[NDArray[np.uint8]] = None

    def detect(self, picture: Picture, threshold: Optional[float] = None) -> Tuple[Detection, ...]:
        """Objects with a score of at least `threshold` (None: the manifest's), best first. Raises EngineError."""
        height, width = picture.shape[:2]
        outputs = self._engine.run(self._inputs(self._prepared(picture), height, width))
        wanted = self.facts.threshold if threshold is None else threshold
        try:
            if self.facts.contract == "deploy":
                return from_deploy(outputs, self.facts, height, width, wanted)
            if "scores" in outputs:
                return from_best(outputs, self.facts, height, width, wanted)
            return from_raw(outputs, self.facts, height, width, wanted)
        except (KeyError, IndexError, ValueError) as error:
            shapes = {name: value.shape for name, value in outputs.items()}
            raise EngineError(
                f"{self.name}: outputs {shapes} do not fit the contract {self.facts.contract!r} with {len(self.facts.labels)} labels: "
                f"{error}; correct contract, scores or labels in its manifest"
            ) from error

    def _prepared(self, picture: Picture) -> NDArray[np.generic]:
        """The picture in the engine's size: as bytes where the graph normalises them itself (`takes_bytes`), else as planes."""
        height, width = input_size(self.facts, picture.shape[0], picture.shape[1])
        if self._takes_bytes:
            self._pixels = pixels_of(picture, height, width, self._pixels)
            return self._pixels
        self._planes = planes_of(picture, height, width, self._tables, self._planes)
        return self._planes

    def _inputs(self, planes: NDArray[np.generic], height: int, width: int) -> Dict[str, NDArray[np.generic]]:
        if self.facts.contract == "deploy":
            return {"images": planes, "orig_target_sizes": np.array([[width, height]], np.int64)}
        inputs: Dict[str, NDArray[np.generic]] = {"pixel_values": planes}
        for spec in self._engine.inputs:
            if spec.name == "pixel_mask":  # some exports of DETR keep it; all ones: nothing is padded here
                sides = [fixed if fixed > 0 else own for fixed, own in zip(spec.shape[1:], planes.shape[2:])]
                inputs["pixel_mask"] = np.ones((1, *sides), spec.dtype)
        return inputs


def channel_tables(facts: manifest.Detection) -> Tuple[NDArray[np.float32], ...]:
    """One table per channel R, G, B from a byte to its normalised value."""
    share = np.arange(256, dtype=np.float64) / 255
    return tuple(((share - mean) / std).astype(np.float32) for mean, std in zip(facts.mean, facts.std))


def input_size(facts: manifest.Detection, height: int, width: int) -> Tuple[int, int]:
    """(height, width) to which a picture is scaled. `shortest_edge` as in DETR (Carion et al., 2020), rounded as transformers does."""
    if facts.resize == "stretch":
        return facts.height, facts.width
    short, long = min(height, width), max(height, width)
    edge = facts.height if long * facts.height <= facts.width * short else max(1, round(facts.width * short / long))
    other = max(1, int(edge * long / short))
    return (edge, other) if height <= width else (other, edge)


def from_raw(
    outputs: Mapping[str, NDArray[np.float32]], facts: manifest.Detection, height: int, width: int, threshold: float
) -> Tuple[Detection, ...]:
    """Detections from `logits [1,Q,C]` and `pred_boxes [1,Q,4]`.

    sigmoid: the best Q pairs of query and class, a query may stand for two classes (as RT-DETR, Zhao et al., 2023); softmax: each
    query's best class but the last one, the background.
    """
    logits, boxes = np.asarray(outputs["logits"][0], np.float32), np.asarray(outputs["pred_boxes"][0], np.float32)
    classes = logits.shape[1] - (facts.scores == "softmax")
    if classes != len(facts.labels):
        raise ValueError(f"{classes} classes")
    _refuse_nan(logits, boxes)
    if facts.scores == "softmax":
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        share = odds[:, :-1] / odds.sum(axis=1, keepdims=True)
        queries, labels = np.arange(len(share)), share.argmax(axis=1)
        scores = share[queries, labels]
    else:
        flat = logits.reshape(-1)
        # Held against the threshold as logits: few of the Q*C values are worth an exponential.
        kept = np.flatnonzero(flat >= _logit(threshold))
        if len(kept) > len(logits):
            kept = kept[np.argpartition(-flat[kept], len(logits) - 1)[: len(logits)]]
        scores = 1 / (1 + np.exp(-flat[kept].astype(np.float64)))
        queries, labels = np.divmod(kept, classes)
    return _detections(facts.labels, labels, scores, _corners(boxes, height, width)[queries], height, width, threshold)


def from_best(
    outputs: Mapping[str, NDArray[np.generic]], facts: manifest.Detection, height: int, width: int, threshold: float
) -> Tuple[Detection, ...]:
    """Detections from `scores [1,K]`, `labels [1,K]` and `pred_boxes [1,K,4]` as in the contract `raw`: a graph with `top_k`."""
    boxes, scores = np.asarray(outputs["pred_boxes"][0], np.float32), np.asarray(outputs["scores"][0], np.float64)
    _refuse_nan(boxes, scores)
    return _detections(
        facts.labels, np.asarray(outputs["labels"][0], np.int64), scores, _corners(boxes, height, width), height, width, threshold
    )


def from_deploy(
    outputs: Mapping[str, NDArray[np.generic]], facts: manifest.Detection, height: int, width: int, threshold: float
) -> Tuple[Detection, ...]:
    """Detections from `labels [1,K]`, `boxes [1,K,4]` xyxy in pixels and `scores [1,K]`."""
    boxes, scores = np.asarray(outputs["boxes"][0], np.float32), np.asarray(outputs["scores"][0], np.float64)
    _refuse_nan(boxes, scores)
    return _detections(facts.labels, np.asarray(outputs["labels"][0], np.int64), scores, boxes, height, width, threshold)


def _corners(boxes: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """(cx, cy, w, h) in 0..1 as (x0, y0, x1, y1) in pixels."""
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    return np.asarray(corners * np.array((width, height, width, height), np.float32))


def _detections(
    names: Sequence[str],
    labels: NDArray[np.int64],
    scores: NDArray[np.floating],
    corners: NDArray[np.float32],
    height: int,
    width: int,
    threshold: float,
) -> Tuple[Detection, ...]:
    corners = np.clip(corners, 0, np.array((width, height, width, height), np.float32))
    has_area = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
    found: List[Detection] = []
    for index in np.argsort(-scores, kind="stable"):
        if scores[index] >= threshold and has_area[index]:
            x0, y0, x1, y1 = (float(value) for value in corners[index])
            label = int(labels[index])
            if not 0 <= label < len(names):
                raise ValueError(f"class {label}")
            found.append(Detection(names[label], float(scores[index]), x0, y0, x1, y1))
    return tuple(found)


def _logit(share: float) -> float:
    if share <= 0:
        return -np.inf
    return np.inf if share >= 1 else float(np.log(share / (1 - share)))


def _refuse_nan(*arrays: NDArray[np.floating]) -> None:
    # Half precision engines of this family overflow on some runtimes: no boxes at all would look like an empty scene.
    if any(np.isnan(array).any() for array in arrays):
        raise EngineError("the engine returned not-a-number; build it with float32 normalisation and attention, or in float32")
