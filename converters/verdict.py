"""Whether an engine is still the model that it was made from, in figures, with all that was tried."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime

from converters.ladder import Rung

# How far the outputs as a whole may be from the reference's, as ‖found - expected‖ / ‖expected‖. In float32 only the order of sums
# differs; TF32 has 11 bits in its products, half precision 11 bits and less range everywhere. What int8 costs only the task can say.
MAX_RELATIVE_ERROR: Mapping[Rung, float] = {"fp32": 1e-3, "tf32": 5e-3, "fp16": 1e-2}

Status = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Comparison:
    """The same `inputs` went through reference and engine.

    figures    generation: mean_kl, max_kl (nats per token), top1_agreement, greedy_agreement, perplexity_source, perplexity_result;
               embedding: min_cosine, mean_cosine, max_relative_error; classification: agreement, mean_kl, max_logit_delta,
               max_relative_error; detection: matched_boxes (share), compared_boxes, p95_, p99_ and max_score_delta
    tolerance  the limits that decided, each named after its figure
    reason     why it did not pass; empty when it did
    own_inputs how many of the inputs were the operator's; the others were made up
    """

    figures: Mapping[str, float]
    tolerance: Mapping[str, float]
    inputs: int
    seconds: float
    reason: str = ""
    own_inputs: int = 0

    @property
    def passed(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class WorstTensor:
    """Where a candidate leaves its source: the first value, in the order of computation, further away than rounding explains.

    `relative_error` is ‖found - expected‖ / ‖expected‖, or None where the candidate holds something that is no number; `last_good` is the
    value before it that was still right.
    """

    name: str
    operator: str
    relative_error: float | None
    last_good: str = ""


@dataclass(frozen=True)
class Attempt:
    """One step of the ladder. `seconds` is building and comparing together; figures are empty where no engine came about or ran."""

    precision: str
    status: Status
    reason: str
    figures: Mapping[str, float]
    tolerance: Mapping[str, float]
    inputs: int
    seconds: float
    worst: WorstTensor | None = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    own_inputs: int = 0


@dataclass(frozen=True)
class Verdict:
    """What is known of an engine: the attempt that it came from, the last of `attempts`."""

    task: str
    asked: Rung
    attempts: tuple[Attempt, ...]

    @property
    def last(self) -> Attempt:
        return self.attempts[-1]

    @property
    def passed(self) -> bool:
        return self.last.status == "passed"

    def to_json(self) -> dict[str, Any]:
        attempts = [dataclasses.asdict(attempt) for attempt in self.attempts]
        last = {name: value for name, value in attempts[-1].items() if name not in ("worst", "notes")}
        return {"passed": self.passed, "task": self.task, "asked": self.asked, **last, "attempts": attempts}


def decide(figures: Mapping[str, float], tolerance: Mapping[str, float]) -> str:
    """The first figure outside its limit as a sentence, or an empty text.

    Limits of `max_…`, `p95_…`, `p99_…` and `mean_kl` are upper ones, others lower. A figure that is not a number is outside any limit.
    """
    for name, limit in tolerance.items():
        value = figures[name]
        is_upper = name.startswith(("max_", "p95_", "p99_")) or name == "mean_kl"
        if not (value <= limit if is_upper else value >= limit):
            return f"{name} is {value:.6g}, {'above' if is_upper else 'below'} the tolerance of {limit:g}"
    return ""


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """What had a hand in the result; `packages`: those that only some lines need."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
        **{name: metadata.version(name) for name in packages},
    }
