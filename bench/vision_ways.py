"""Ways from a picture to boxes, each timed in its parts: ours, plain ONNX Runtime, and transformers' pipeline in another process."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime

from bench.average_precision import Found
from bench.report import busy_s, spent_s
from models.manifest import Detection
from models.pictures import Picture
from models.scaling import placement_of
from models.tasks.detection import Detector

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Turn:
    """One frame: milliseconds of the whole and of its parts, CPU milliseconds, and the cores that others used meanwhile."""

    ms: float
    pre_ms: float
    run_ms: float
    post_ms: float
    cpu_ms: float
    neighbours: float = 0.0


Way = Callable[[Picture], Turn]


def ours(detector: Detector, threshold: float = 0.5) -> Way:
    def detect(picture: Picture) -> Turn:
        cpu_s, times_s = time.process_time(), [time.perf_counter()]
        prepared = detector.prepare((picture,))
        times_s.append(time.perf_counter())
        outputs = detector.run(prepared)
        times_s.append(time.perf_counter())
        detector.finish(prepared, outputs, threshold)
        times_s.append(time.perf_counter())
        return _turn(times_s, cpu_s)

    return detect


def plain(path: Path, facts: Detection, threads: int) -> Way:
    """What one writes down first: session.run with its defaults, cv2 and numpy, everything allocated anew."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def detect(picture: Picture) -> Turn:
        cpu_s, times_s = time.process_time(), [time.perf_counter()]
        tensor = plainly_prepared(picture, facts)
        times_s.append(time.perf_counter())
        logits, boxes = session.run(["logits", "pred_boxes"], {"pixel_values": tensor})
        times_s.append(time.perf_counter())
        plainly_finished(logits, boxes, facts, picture, 100)
        times_s.append(time.perf_counter())
        return _turn(times_s, cpu_s)

    return detect


def plainly_prepared(picture: Picture, facts: Detection) -> Any:
    height, width = placement_of(facts, *picture.shape[:2]).scaled
    scaled = cv2.cvtColor(cv2.resize(picture, (width, height)), cv2.COLOR_BGR2RGB).astype(np.float32) / 255
    return np.ascontiguousarray(
        ((scaled - np.asarray(facts.mean, np.float32)) / np.asarray(facts.std, np.float32)).transpose(2, 0, 1)[None]
    )


def plainly_finished(logits: Any, boxes: Any, facts: Detection, picture: Picture, count: int) -> list[Found]:
    if facts.scores == "softmax":
        odds = np.exp(logits[0] - logits[0].max(axis=1, keepdims=True))
        scores = (odds / odds.sum(axis=1, keepdims=True))[:, :-1]
    else:
        scores = 1 / (1 + np.exp(-logits[0]))
    height, width = picture.shape[:2]
    found = []
    for query, label in zip(*np.unravel_index(np.argsort(-scores, axis=None)[:count], scores.shape), strict=True):
        x, y, w, h = boxes[0, query] * (width, height, width, height)
        found.append(Found(facts.labels[label], float(scores[query, label]), (x - w / 2, y - h / 2, x + w / 2, y + h / 2)))
    return found


def _turn(times_s: Sequence[float], cpu_s: float) -> Turn:
    pre, run, post = ((after - before) * 1000 for before, after in itertools.pairwise(times_s))
    return Turn(pre + run + post, pre, run, post, (time.process_time() - cpu_s) * 1000)


class Peer:
    """bench/vision_peer.py under another interpreter. Close it."""

    def __init__(self, python: Path, folder: Path, threads: int) -> None:
        command = [str(python), "-m", "bench.vision_peer", "serve", str(folder), str(threads)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._frame = folder / "frame.npy"
        self._folder = folder
        self._written: Picture | None = None
        self.facts = json.loads(self._process.stdout.readline())  # type: ignore[union-attr]

    @property
    def pid(self) -> int:
        return self._process.pid

    def detect(self, picture: Picture) -> Turn:
        if self._written is not picture:
            np.save(self._frame, picture)
            self._written = picture
        answer = self._ask({"picture": str(self._frame)})
        return Turn(answer["ms"], answer["pre_ms"], answer["run_ms"], answer["post_ms"], answer["cpu_ms"])

    def outputs(self, picture: Picture, planes: Any) -> dict[str, Any]:
        """What torch makes of the input that we prepared."""
        np.save(self._frame, picture)
        np.save(self._folder / "planes.npy", planes)
        return dict(np.load(self._ask({"picture": str(self._frame), "planes": str(self._folder / "planes.npy")})["outputs"]))

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(20)

    def _ask(self, question: dict[str, str]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(question) + "\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"the pipeline ended with status {self._process.wait(20)}; its words are above")
        return dict(json.loads(line))


def interleaved(ways: dict[str, Way], picture: Picture, rounds: int) -> dict[str, list[Turn]]:
    """The ways take turns. Each looks twice and the second look counts: idle threads of another session have stopped spinning by then."""
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, look in ways.items():
            look(picture)
            before_s, own_s, began_s = busy_s(), spent_s(os.getpid()), time.perf_counter()
            turn = look(picture)
            # A look is too short for the ticks of the kernel's counters where it lasts but milliseconds; then neighbours count as none.
            spent_by_others_s = busy_s() - before_s - (spent_s(os.getpid()) - own_s)
            turns[name].append(Turn(**{**vars(turn), "neighbours": max(0.0, spent_by_others_s / (time.perf_counter() - began_s))}))
    return turns
