"""Is an optimised ONNX model still its source? The same inputs through both, behind the task's own pre- and post-processing.

The source runs unoptimised, node by node as it was exported.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from converters.verdict import Verdict, decide
from models.engines import Engine
from models.engines.onnx import OnnxEngine
from models.manifest import ClassificationManifest, DetectionManifest, EmbeddingManifest
from models.tasks.classification import classify
from models.tasks.embedding import embed, normalise

SENTENCES = (
    "What is the weather like in Lisbon on 24 December?",
    "Transfer 250 euros from my savings to the joint account.",
    "The parcel stopped on the belt; the sensor at gate 3 reports a jam.",
    "Wie hoch ist der Eiffelturm?",
    "ok",
    "A keeper's day began at dusk: he trimmed the wick, wound the clockwork that turned the lens, and noted wind and passing ships.",
    "ERROR 503: upstream timed out (110: Connection timed out) while reading response header",
    "会议改到星期五下午三点。",
)
PICTURES = 4
# Boxes are compared among the best of each picture, whatever their score: on made-up pictures few are sure.
BOXES = 10
MIN_OVERLAP = 0.9


def open_source(path: Path, threads: int) -> OnnxEngine:
    """The source model without any optimisation."""
    return _open(path, threads, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)


def open_result(path: Path, threads: int) -> OnnxEngine:
    return _open(path, threads, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)


def verify_encoder(manifest: EmbeddingManifest | ClassificationManifest, source: Engine, result: Engine, tokenizer: Path | None) -> Verdict:
    """Compare vectors (cosine) or classes of some sentences, or of random tokens where there is no tokenizer."""
    start = time.monotonic()
    sequences = _sequences(tokenizer)
    if isinstance(manifest, EmbeddingManifest):
        expected, found = (normalise(embed(engine, manifest.embedding, sequences).vectors) for engine in (source, result))
        cosines = np.sum(expected * found, axis=1, dtype=np.float64)
        figures = {"min_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}
        tolerance = {"min_cosine": manifest.embedding.min_cosine}
    else:
        expected, found = (classify(engine, manifest.classification, sequences).logits for engine in (source, result))
        delta = float(np.abs(expected - found).max())
        agreement = float(np.mean(expected.argmax(axis=1) == found.argmax(axis=1))) if np.isfinite(delta) else float("nan")
        figures = {"agreement": agreement, "max_logit_delta": delta}
        tolerance = {"agreement": manifest.classification.min_agreement}
    reason = decide(figures, tolerance)
    return Verdict(not reason, manifest.task, figures, tolerance, len(sequences), round(time.monotonic() - start, 3), reason)


def verify_detection(manifest: DetectionManifest, source: Engine, result: Engine, pictures: Sequence[NDArray[np.uint8]] = ()) -> Verdict:
    """Compare the best boxes of `pictures` (uint8 [height, width, 3], BGR), or of made-up ones."""
    from models.tasks.detection import Detection, Detector  # brings OpenCV, which text needs not

    start = time.monotonic()
    pictures = list(pictures) or made_up_pictures(PICTURES)
    reference, candidate = Detector(source, manifest), Detector(result, manifest)
    pairs: list[tuple[Detection, Detection | None]] = []
    for picture in pictures:
        found = candidate.detect(picture, 0.0)
        for box in reference.detect(picture, 0.0)[:BOXES]:
            twins = [other for other in found if other.label == box.label and _overlap(box, other) >= MIN_OVERLAP]
            pairs.append((box, min(twins, key=lambda other: abs(other.score - box.score), default=None)))
    deltas = [abs(box.score - twin.score) for box, twin in pairs if twin is not None]
    figures = {
        "matched_boxes": len(deltas) / len(pairs) if pairs else float("nan"),
        "compared_boxes": float(len(pairs)),
        "max_score_delta": max(deltas, default=float("nan")),
    }
    tolerance = {"matched_boxes": 0.95, "max_score_delta": manifest.detection.max_score_delta}
    reason = decide(figures, tolerance)
    return Verdict(not reason, "detection", figures, tolerance, len(pictures), round(time.monotonic() - start, 3), reason)


def made_up_pictures(count: int) -> list[NDArray[np.uint8]]:
    """Smooth random backgrounds with a few flat rectangles, always the same."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3))
        picture = np.kron(coarse, np.ones((40, 40, 1))).astype(np.uint8)
        for _ in range(6):
            top, left = int(rng.integers(0, 400)), int(rng.integers(0, 560))
            picture[top : top + int(rng.integers(30, 200)), left : left + int(rng.integers(30, 200))] = rng.integers(0, 256, 3)
        pictures.append(picture)
    return pictures


def _overlap(one: object, other: object) -> float:
    """Intersection over union of two boxes."""
    a, b = (np.array([getattr(box, side) for side in ("x0", "y0", "x1", "y1")]) for box in (one, other))
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    common = float(np.prod(np.maximum(sides, 0)))
    union = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - common
    return common / union if union > 0 else 0.0


def _sequences(tokenizer: Path | None) -> list[list[int]]:
    if tokenizer is not None:
        encode = Tokenizer.from_file(str(tokenizer)).encode
        return [list(encode(sentence).ids) for sentence in SENTENCES]
    rng = np.random.default_rng(0)
    return [rng.integers(0, 100, length).tolist() for length in (3, 8, 16, 24, 32, 48)]


def _open(path: Path, threads: int, level: object) -> OnnxEngine:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return OnnxEngine(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), path.name, "cpu")
