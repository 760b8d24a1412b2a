"""Whether a result is still the model that it was made from, in figures."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime


@dataclass(frozen=True)
class Verdict:
    """The same `inputs` went through source and result.

    figures    generation: mean_kl, max_kl (nats per token), top1_agreement, greedy_agreement, perplexity_source, perplexity_result;
               embedding: min_cosine, mean_cosine; classification: agreement, max_logit_delta;
               detection: matched_boxes (share), compared_boxes, max_score_delta
    tolerance  the limits that decided, each named after its figure
    reason     why it did not pass; empty when it did
    """

    passed: bool
    task: str
    figures: Mapping[str, float]
    tolerance: Mapping[str, float]
    inputs: int
    seconds: float
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def decide(figures: Mapping[str, float], tolerance: Mapping[str, float]) -> str:
    """The first figure outside its limit as a sentence, or an empty text. Limits of `max_…` and `mean_kl` are upper ones, others lower.

    A figure that is not a number is outside any limit.
    """
    for name, limit in tolerance.items():
        value = figures[name]
        is_upper = name.startswith("max_") or name == "mean_kl"
        if not (value <= limit if is_upper else value >= limit):
            return f"{name} is {value:.6g}, {'above' if is_upper else 'below'} the tolerance of {limit:g}"
    return ""


def versions() -> dict[str, str]:
    """What had a hand in the result."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
    }
