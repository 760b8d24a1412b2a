"""Object detection with the DETR family: pictures in, boxes in their pixels out. Pure functions around one run of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from models import manifest
from models.engines import Engine, EngineError
from models.pictures import Picture
from models.scaling import Placement, Scaler, placement_of

Outputs = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Detection:
    """One object: upper left corner (x0, y0) and lower right corner (x1, y1) in pixels, within the picture."""

    label: str
    score: float
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Prepared:
    """Inputs of one run of the engine, and where in them each picture lies. Valid until the detector prepares again."""

    inputs: Dict[str, NDArray[np.generic]]
    placements: Tuple[Placement, ...]


class Detector:
    """A detection model ready for pictures. Belongs to the engine's thread; the engine stays the caller's to close.

    `detect` and `detect_many` do all; `prepare`, `run` and `finish` are their parts, for those who batch or measure.
    """

    def __init__(self, engine: Engine, model: manifest.DetectionManifest) -> None:
        self.name = model.name
        self.facts = model.detection
        self._engine = engine
        self._takes_bytes = any(spec.dtype == "uint8" for spec in engine.inputs)
        self._scaler = Scaler(self.facts)
        self._rows = next((spec.shape[0] for spec in engine.inputs if spec.shape), -1)
        self._batch_max = self._rows if self._rows > 0 else max(1, model.build.batch_max)

    @property
    def batch_max(self) -> int:
        """Most pictures of one run."""
        return self._batch_max

    def input_size(self, height: int, width: int) -> Tuple[int, int]:
        """(height, width) of the model's input for a picture of that size: those of one input size can be prepared together."""
        return placement_of(self.facts, height, width).canvas

    def detect(self, picture: Picture, threshold: Optional[float] = None) -> Tuple[Detection, ...]:
        """Objects with a score of at least `threshold` (None: the manifest's), best first. Raises EngineError."""
        prepared = self.prepare((picture,))
        return self.finish(prepared, self.run(prepared), threshold)[0]

    def detect_many(self, pictures: Sequence[Picture], threshold: Optional[float] = None) -> List[Tuple[Detection, ...]]:
        """As `detect` of each, in as few runs as sizes and `batch_max` allow. Raises EngineError."""
        alike: Dict[Tuple[int, int], List[int]] = {}
        for index, picture in enumerate(pictures):
            alike.setdefault(self.input_size(*picture.shape[:2]), []).append(index)
        found: List[Tuple[Detection, ...]] = [()] * len(pictures)
        for indices in alike.values():
            for first in range(0, len(indices), self._batch_max):
                batch = indices[first : first + self._batch_max]
                prepared = self.prepare([pictures[index] for index in batch])
                for index, each in zip(batch, self.finish(prepared, self.run(prepared), threshold)):
                    found[index] = each
        return found

    def prepare(self, pictures: Sequence[Picture]) -> Prepared:
        """Scale pictures of one input size into the memory that the engine reads: as bytes where the graph normalises them itself
        (`takes_bytes`), else as planes. Raises ValueError for more than `batch_max` or of several sizes."""
        placements = tuple(placement_of(self.facts, *picture.shape[:2]) for picture in pictures)
        if not 0 < len(placements) <= self._batch_max or len({each.canvas for each in placements}) > 1:
            sizes = ", ".join("x".join(map(str, each.canvas)) for each in placements)
            raise ValueError(f"{self.name} takes 1 to {self._batch_max} pictures of one input size at once, not {sizes or 'none'}")
        rows = self._rows if self._rows > 0 else len(placements)
        tensor = self._scaler.pixels if self._takes_bytes else self._scaler.planes
        return Prepared(self._inputs(tensor(pictures, placements, rows), placements, rows), placements)

    def run(self, prepared: Prepared) -> Outputs:
        """What the model answers; valid until the next run. Raises EngineError."""
        return self._engine.run(prepared.inputs)

    def finish(self, prepared: Prepared, outputs: Outputs, threshold: Optional[float] = None) -> Tuple[Tuple[Detection, ...], ...]:
        """What was found in each picture, best first. Raises EngineError for outputs that do not fit the manifest."""
        wanted = self.facts.threshold if threshold is None else threshold
        read = from_deploy if self.facts.contract == "deploy" else from_best if "scores" in outputs else from_raw
        try:
            return tuple(read(outputs, self.facts, place, wanted, row) for row, place in enumerate(prepared.placements))
        except (KeyError, IndexError, ValueError) as error:
            shapes = {name: value.shape for name, value in outputs.items()}
            raise EngineError(
                f"{self.name}: outputs {shapes} do not fit the contract {self.facts.contract!r} with {len(self.facts.labels)} labels: "
                f"{error}; correct contract, scores or labels in its manifest"
            ) from error

    def _inputs(self, tensor: NDArray[np.generic], placements: Sequence[Placement], rows: int) -> Dict[str, NDArray[np.generic]]:
        if self.facts.contract == "deploy":
            sizes = np.ones((rows, 2), np.int64)
            sizes[: len(placements)] = [[round(side) for side in reversed(each.extent)] for each in placements]
            return {"images": tensor, "orig_target_sizes": sizes}
        inputs: Dict[str, NDArray[np.generic]] = {"pixel_values": tensor}
        for spec in self._engine.inputs:
            if spec.name == "pixel_mask":  # some exports of DETR keep it: where there is picture
                sides = [fixed if fixed > 0 else own for fixed, own in zip(spec.shape[1:], placements[0].canvas)]
                mask = np.ones((rows, *sides), spec.dtype)
                if self.facts.resize == "letterbox":
                    for row, place in zip(mask, placements):
                        row[place.scaled[0] :], row[:, place.scaled[1] :] = 0, 0
                inputs["pixel_mask"] = mask
        return inputs


def from_raw(outputs: Outputs, facts: manifest.Detection, place: Placement, threshold: float, row: int = 0) -> Tuple[Detection, ...]:
    """Detections from row `row` of `logits [N,Q,C]` and `pred_boxes [N,Q,4]`.

    sigmoid: the best Q pairs of query and class, a query may stand for two classes (as RT-DETR, Zhao et al., 2023); softmax: each
    query's best class but the last one, the background.
    """
    logits, boxes = np.asarray(outputs["logits"][row], np.float32), np.asarray(outputs["pred_boxes"][row], np.float32)
    classes = logits.shape[1] - (facts.scores == "softmax")
    if classes != len(facts.labels):
        raise ValueError(f"{classes} classes")
    _refuse_nan(logits, boxes)
    if facts.scores == "softmax":
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        labels = odds[:, :-1].argmax(axis=1)
        scores = odds[np.arange(len(odds)), labels] / odds.sum(axis=1)
        queries = np.flatnonzero(scores >= threshold)
        scores, labels = scores[queries], labels[queries]
    else:
        flat = logits.reshape(-1)
        # Held against the threshold as logits: few of the Q*C values are worth an exponential.
        kept = np.flatnonzero(flat >= _logit(threshold))
        if len(kept) > len(logits):
            kept = kept[np.argpartition(-flat[kept], len(logits) - 1)[: len(logits)]]
        scores = 1 / (1 + np.exp(-flat[kept].astype(np.float64)))
        queries, labels = np.divmod(kept, classes)
    return _detections(facts.labels, labels, scores, _corners(boxes[queries], place), place, threshold)


def from_best(outputs: Outputs, facts: manifest.Detection, place: Placement, threshold: float, row: int = 0) -> Tuple[Detection, ...]:
    """Detections from `scores [N,K]`, `labels [N,K]` and `pred_boxes [N,K,4]` as in the contract `raw`: a graph with `top_k`."""
    boxes, scores = np.asarray(outputs["pred_boxes"][row], np.float32), np.asarray(outputs["scores"][row], np.float64)
    _refuse_nan(boxes, scores)
    return _detections(facts.labels, np.asarray(outputs["labels"][row], np.int64), scores, _corners(boxes, place), place, threshold)


def from_deploy(outputs: Outputs, facts: manifest.Detection, place: Placement, threshold: float, row: int = 0) -> Tuple[Detection, ...]:
    """Detections from `labels [N,K]`, `boxes [N,K,4]` xyxy in pixels and `scores [N,K]`."""
    boxes, scores = np.asarray(outputs["boxes"][row], np.float32), np.asarray(outputs["scores"][row], np.float64)
    _refuse_nan(boxes, scores)
    return _detections(facts.labels, np.asarray(outputs["labels"][row], np.int64), scores, boxes, place, threshold)


def _corners(boxes: NDArray[np.float32], place: Placement) -> NDArray[np.float32]:
    """(cx, cy, w, h) in shares of the input as (x0, y0, x1, y1) in pixels of the picture."""
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    height, width = place.extent
    return np.asarray(corners * np.array((width, height, width, height), np.float32))


def _detections(
    names: Sequence[str],
    labels: NDArray[np.int64],
    scores: NDArray[np.floating],
    corners: NDArray[np.float32],
    place: Placement,
    threshold: float,
) -> Tuple[Detection, ...]:
    height, width = place.picture
    corners = np.clip(corners, 0, np.array((width, height, width, height), np.float32))
    has_area = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
    kept = np.flatnonzero((scores >= threshold) & has_area)
    if len(kept) == 0:
        return ()
    kept = kept[np.argsort(-scores[kept], kind="stable")]
    least, most = labels[kept].min(), labels[kept].max()
    if least < 0 or most >= len(names):
        raise ValueError(f"class {least if least < 0 else most}")
    table = zip(labels[kept].tolist(), scores[kept].tolist(), corners[kept].tolist())
    return tuple(Detection(names[label], score, *box) for label, score, box in table)


def _logit(share: float) -> float:
    if share <= 0:
        return -np.inf
    return np.inf if share >= 1 else float(np.log(share / (1 - share)))


def _refuse_nan(*arrays: NDArray[np.floating]) -> None:
    # Half precision engines of this family overflow on some runtimes: no boxes at all would look like an empty scene.
    # The largest of several values is no number if one of them is none.
    if any(array.size and np.isnan(array.max()) for array in arrays):
        raise EngineError("the engine returned not-a-number; build it with float32 normalisation and attention, or in float32")
