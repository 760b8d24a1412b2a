"""Is an engine without state still the model it was made from? The same inputs through both, behind the task's own pre- and
post-processing, so that what is compared is what will be served.

The reference runs unoptimised in float32, node by node as it was exported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from converters.gate_inputs import SENTENCES, made_up_pictures, topped_up
from converters.ladder import Rung
from converters.verdict import MAX_RELATIVE_ERROR, Comparison, decide
from models.engines import Engine, EngineError
from models.engines.onnx import OnnxEngine
from models.manifest import ClassificationManifest, DetectionManifest, EmbeddingManifest
from models.tasks.classification import classify, softmax
from models.tasks.embedding import embed, normalise

# Boxes are compared among the best of each picture, whatever their score: on made-up pictures few are sure.
BOXES = 10
MIN_OVERLAP = 0.9
MIN_MATCHED = 0.95
# Of so many boxes in a hundred, how many times the manifest's tolerance their scores may be off. A few of hundreds always lie where two
# answers are equally likely and half precision decides otherwise (docs/decisions.md has the figures); 100 is the worst of all.
SCORE_LIMITS = {95: 1, 99: 3, 100: 10}


def open_source(path: Path, threads: int) -> OnnxEngine:
    """The source model without any optimisation."""
    return _open(path, threads, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)


def open_result(path: Path, threads: int) -> OnnxEngine:
    return _open(path, threads, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)


def verify_encoder(
    manifest: EmbeddingManifest | ClassificationManifest,
    source: Engine,
    result: Engine,
    tokenizer: Path | None,
    texts: Sequence[str] = (),
    precision: Rung = "fp32",
    rows: int = 0,
) -> Comparison:
    """Compare vectors (cosine) or classes of `texts` and of as many sentences as make sixteen, or of random tokens where there is no
    tokenizer.

    `rows`: most sequences of one call of the engines; 0: all. Raises EngineError.
    """
    start = time.monotonic()
    sequences, own = _sequences(tokenizer, texts)
    reference, candidate = Watched(source), Watched(result)
    expected, found = (_outputs(manifest, engine, sequences, rows) for engine in (reference, candidate))
    figures, tolerance = (
        _vectors(manifest, expected, found) if isinstance(manifest, EmbeddingManifest) else _classes(manifest, expected, found)
    )
    if precision in MAX_RELATIVE_ERROR:
        tolerance["max_relative_error"] = MAX_RELATIVE_ERROR[precision]
    reason = candidate.reason(reference) or decide(figures, tolerance)
    return Comparison(figures, tolerance, len(sequences), round(time.monotonic() - start, 3), reason, own)


def _outputs(
    manifest: EmbeddingManifest | ClassificationManifest, engine: Engine, sequences: Sequence[Sequence[int]], rows: int
) -> NDArray[np.float32]:
    groups = [sequences[first : first + (rows or len(sequences))] for first in range(0, len(sequences), rows or len(sequences))]
    if isinstance(manifest, EmbeddingManifest):
        return np.concatenate([normalise(embed(engine, manifest.embedding, group).vectors) for group in groups])
    return np.concatenate([classify(engine, manifest.classification, group).logits for group in groups])


def verify_detection(manifest: DetectionManifest, source: Engine, result: Engine, pictures: Sequence[NDArray[np.uint8]] = ()) -> Comparison:
    """Compare the best boxes of `pictures` (uint8 [height, width, 3], BGR) and made-up ones up to sixteen. Raises EngineError."""
    from models.tasks.detection import Detection, Detector  # brings OpenCV, which text needs not

    start = time.monotonic()
    own, pictures = len(pictures), topped_up(pictures, made_up_pictures())
    reference, candidate = Watched(source), Watched(result)
    one, other = Detector(reference, manifest), Detector(candidate, manifest)
    pairs: list[tuple[Detection, Detection | None]] = []
    for picture in pictures:
        expected = one.detect(picture, 0.0)
        try:
            found = other.detect(picture, 0.0)
        except EngineError:
            if candidate.reason(reference):
                break
            raise
        # Both ways: a lost box has no twin in the result, an invented or doubled one none in the source.
        pairs += [*_twins(expected, found), *_twins(found, expected)]
    deltas = [abs(box.score - twin.score) for box, twin in pairs if twin is not None] or [float("nan")]
    figures = {
        "matched_boxes": sum(twin is not None for _, twin in pairs) / len(pairs) if pairs else float("nan"),
        "compared_boxes": float(len(pairs)),
        **{_delta_name(percent): float(np.percentile(deltas, percent, method="higher")) for percent in SCORE_LIMITS},
    }
    limits = {_delta_name(percent): times * manifest.detection.max_score_delta for percent, times in SCORE_LIMITS.items()}
    tolerance = {"matched_boxes": MIN_MATCHED, **limits}
    reason = candidate.reason(reference) or decide(figures, tolerance)
    return Comparison(figures, tolerance, len(pictures), round(time.monotonic() - start, 3), reason, own)


def _delta_name(percent: int) -> str:
    return "max_score_delta" if percent == 100 else f"p{percent}_score_delta"


class Watched:
    """An engine whose outputs are searched for what is no number."""

    def __init__(self, engine: Engine) -> None:
        self.inputs, self.outputs, self.provider = engine.inputs, engine.outputs, engine.provider
        self.strange: dict[str, str] = {}
        self._engine = engine
        self._runs = 0

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = self._engine.run(inputs)
        self._runs += 1
        for name, value in outputs.items():
            if np.issubdtype(value.dtype, np.floating) and name not in self.strange and not np.isfinite(value).all():
                self.strange[name] = f"{'NaN' if np.isnan(value).any() else 'infinity'} in run {self._runs}"
        return outputs

    def close(self) -> None:
        self._engine.close()

    def reason(self, reference: Watched) -> str:
        """The first output that holds what is no number where the reference has numbers; empty if there is none."""
        found = next(((name, what) for name, what in self.strange.items() if name not in reference.strange), None)
        return "" if found is None else f"output {found[0]!r} holds {found[1]}, where the source has numbers"


def _vectors(
    manifest: EmbeddingManifest, expected: NDArray[np.float32], found: NDArray[np.float32]
) -> tuple[dict[str, float], dict[str, float]]:
    cosines = np.sum(expected * found, axis=1, dtype=np.float64)
    figures = {"min_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}
    return {**figures, "max_relative_error": _relative_error(expected, found)}, {"min_cosine": manifest.embedding.min_cosine}


def _classes(
    manifest: ClassificationManifest, expected: NDArray[np.float32], found: NDArray[np.float32]
) -> tuple[dict[str, float], dict[str, float]]:
    delta = float(np.abs(expected - found).max())
    chances, others = softmax(expected.astype(np.float64)), softmax(found.astype(np.float64))
    figures = {
        "agreement": float(np.mean(expected.argmax(axis=1) == found.argmax(axis=1))) if np.isfinite(delta) else float("nan"),
        "mean_kl": float(np.mean(np.sum(chances * (np.log(chances + 1e-30) - np.log(others + 1e-30)), axis=1))),
        "max_logit_delta": delta,
        "max_relative_error": _relative_error(expected, found),
    }
    return figures, {"agreement": manifest.classification.min_agreement}


def _relative_error(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """The largest ‖found - expected‖ / ‖expected‖ of all rows."""
    lengths = np.maximum(np.linalg.norm(expected.astype(np.float64), axis=1), 1e-12)
    return float(np.max(np.linalg.norm(found.astype(np.float64) - expected, axis=1) / lengths))


def _twins(boxes: Sequence[Any], others: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The best of `boxes`, each with the other of its class and place that is nearest in score, if there is one left."""
    left = list(others)
    pairs: list[tuple[Any, Any]] = []
    for box in boxes[:BOXES]:
        near = [other for other in left if other.label == box.label and overlap(box, other) >= MIN_OVERLAP]
        twin = min(near, key=lambda other: abs(other.score - box.score), default=None)
        if twin is not None:
            left.remove(twin)
        pairs.append((box, twin))
    return pairs


def overlap(one: Any, other: Any) -> float:
    """Intersection over union of two boxes."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    common = max(width, 0.0) * max(height, 0.0)
    union = (one.x1 - one.x0) * (one.y1 - one.y0) + (other.x1 - other.x0) * (other.y1 - other.y0) - common
    return float(common / union) if union > 0 else 0.0


def _sequences(tokenizer: Path | None, texts: Sequence[str]) -> tuple[list[list[int]], int]:
    """Tokens of the operator's `texts` and of made-up ones, and how many of them are the operator's."""
    if tokenizer is not None:
        encode = Tokenizer.from_file(str(tokenizer)).encode
        own, sentences = ([ids for ids in (list(encode(text).ids) for text in each) if ids] for each in (texts, SENTENCES))
        return topped_up(own, sentences) if own else sentences, len(own)
    rng = np.random.default_rng(0)
    return [rng.integers(0, 100, length).tolist() for length in (3, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 32, 40, 48)], 0


def _open(path: Path, threads: int, level: object) -> OnnxEngine:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return OnnxEngine(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), path.name, "cpu")
