"""Texts sorted into classes: the logits of an encoder with a classification head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Sequence, Tuple

import numpy as np

from models.engines import Engine, EngineError
from models.manifest import Classification
from models.tasks.encoder import encode, truncate


@dataclass(frozen=True)
class ClassLogits:
    """`logits` float32 [n, classes] in the order of the sequences; `truncated`: indices of sequences over the model's max_tokens."""

    logits: np.ndarray
    truncated: Tuple[int, ...]


@dataclass(frozen=True)
class ScoredLabel:
    label: str
    score: float


def classify(engine: Engine, facts: Classification, sequences: Sequence[Sequence[int]]) -> ClassLogits:
    """Class logits of token id sequences. Raises EngineError; ValueError for an empty sequence."""
    kept, truncated = truncate(sequences, facts.max_tokens)
    logits = np.empty((len(kept), len(facts.labels)), np.float32)
    for batch in encode(engine, kept, facts.output):
        if batch.values.ndim != 2 or batch.values.shape[1] != len(facts.labels):
            raise EngineError(
                f"output {facts.output!r} has shape {list(batch.values.shape)}, the manifest names {len(facts.labels)} labels"
            )
        logits[list(batch.indices)] = batch.values
    return ClassLogits(logits, truncated)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def top_labels(logits: np.ndarray, labels: Sequence[str], count: int) -> List[List[ScoredLabel]]:
    """The `count` most probable labels of each row of `logits` [n, classes], best first."""
    scores = softmax(logits)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return [[ScoredLabel(labels[index], float(row[index])) for index in best] for row, best in zip(scores, order)]
