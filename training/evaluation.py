"""Measure a detector of the belt camera as the product runs it: its preprocessing, its engine, its manifest's threshold."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from models.conveyor import Conveyor
from models.conveyor_sprites import LABELS
from models.engines import EngineOptions, open_engine
from models.manifest import Detection, DetectionManifest, ModelFile
from models.tasks.detection import Detector

LIMITS = (0.5, 0.75, 0.9)
LOWEST_SCORE = 0.02


def evaluate(path: Path, seeds: range, frames_a_seed: int) -> None:
    """Print recall and precision in the middle 80 % of the picture, average precision over all of it, and the time of one picture."""
    facts = Detection(height=192, width=320, labels=LABELS)
    model = DetectionManifest(path.stem, "Apache-2.0", "", "onnx", {"model": ModelFile(f"file:{path}")}, detection=facts)
    counts = dict.fromkeys(("truth", "found", "shown", "right"), 0)
    ranked: dict[tuple[str, float], list[tuple[float, bool]]] = {(label, limit): [] for label in LABELS for limit in LIMITS}
    totals = dict.fromkeys(LABELS, 0)
    times_ms = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.onnx").symlink_to(path.resolve())
        engine = open_engine(Path(folder), EngineOptions(threads=1))
        detector = Detector(engine, model)
        for belt in map(Conveyor, seeds):
            for number in range(frames_a_seed):
                frame, truth = belt.frame(number * 2.37), belt.truth(number * 2.37)
                started = time.perf_counter()
                found = detector.detect(frame, LOWEST_SCORE)
                times_ms.append((time.perf_counter() - started) * 1e3)
                for box in truth:
                    totals[box.label] += 1
                for limit in LIMITS:
                    hits = matches(found, truth, limit)
                    for each, hit in zip(found, hits, strict=True):
                        ranked[each.label, limit].append((each.score, hit >= 0))
                sure = [each for each in found if each.score >= facts.threshold]
                hits = matches(sure, truth, 0.5)
                central = [is_central(box, belt) for box in truth]
                counts["truth"] += sum(central)
                counts["found"] += sum(central[hit] for hit in hits if hit >= 0)
                counts["shown"] += sum(is_central(each, belt) for each in sure)
                counts["right"] += sum(is_central(each, belt) and hit >= 0 for each, hit in zip(sure, hits, strict=True))
        engine.close()
    missed, wrong = counts["truth"] - counts["found"], counts["shown"] - counts["right"]
    recall, precision = counts["found"] / counts["truth"], counts["right"] / max(1, counts["shown"])
    print(f"{len(times_ms)} pictures, {counts['truth']} objects in the middle 80 %, score {facts.threshold}, IoU 0.5:")
    print(f"recall {recall:.4f} ({missed} missed)  precision {precision:.4f} ({wrong} wrong)")
    for limit in LIMITS:
        print(
            f"AP at IoU {limit}: " + "  ".join(f"{label} {average_precision(ranked[label, limit], totals[label]):.4f}" for label in LABELS)
        )
    print(f"one picture with preprocessing, one thread: median {np.median(times_ms):.2f} ms")


def matches(found, truth, limit: float) -> list[int]:
    """For each detection (best score first) the index of the object of its label that it overlaps by `limit` IoU, or -1."""
    free = set(range(len(truth)))
    hits = []
    for each in found:
        best = max((i for i in free if truth[i].label == each.label), key=lambda i: iou(each, truth[i]), default=-1)
        if best >= 0 and iou(each, truth[best]) < limit:
            best = -1
        free.discard(best)
        hits.append(best)
    return hits


def iou(one, other) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    shared = max(0.0, width) * max(0.0, height)
    return shared / ((one.x1 - one.x0) * (one.y1 - one.y0) + (other.x1 - other.x0) * (other.y1 - other.y0) - shared)


def is_central(box, belt: Conveyor) -> bool:
    return 0.1 < (box.x0 + box.x1) / 2 / belt.width < 0.9 and 0.1 < (box.y0 + box.y1) / 2 / belt.height < 0.9


def average_precision(ranked: list[tuple[float, bool]], total: int) -> float:
    """Area under the precision-recall curve, every point used (as in PASCAL VOC 2010)."""
    right = np.array([good for _, good in sorted(ranked, reverse=True)], float).cumsum()
    precision = np.maximum.accumulate((right / np.arange(1, len(right) + 1))[::-1])[::-1]
    return float(np.diff(right, prepend=0) @ precision / total)
