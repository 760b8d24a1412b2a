"""Texts as vectors: the last hidden state of an encoder, pooled. https://www.sbert.net/docs/sentence_transformer/usage/usage.html"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence, Tuple

import numpy as np

from models.engines import Engine, EngineError
from models.manifest import Embedding
from models.tasks.encoder import encode, truncate


@dataclass(frozen=True)
class Embeddings:
    """`vectors` float32 [n, dimensions] in the order of the sequences; `truncated`: indices of sequences over the model's max_tokens."""

    vectors: np.ndarray
    truncated: Tuple[int, ...]


def embed(engine: Engine, facts: Embedding, sequences: Sequence[Sequence[int]]) -> Embeddings:
    """Embed token id sequences that carry their opening and closing marks. Raises EngineError; ValueError for an empty sequence."""
    kept, truncated = truncate(sequences, facts.max_tokens)
    vectors = np.empty((len(kept), facts.dimensions), np.float32)
    for batch in encode(engine, kept, facts.output):
        hidden = batch.values
        if hidden.ndim != 3 or hidden.shape[2] != facts.dimensions:
            raise EngineError(f"output {facts.output!r} has shape {list(hidden.shape)}, the manifest says [n, tokens, {facts.dimensions}]")
        vectors[list(batch.indices)] = hidden[:, 0] if facts.pooling == "first" else mean_pool(hidden, batch.mask)
    return Embeddings(normalise(vectors) if facts.normalise else vectors, truncated)


def mean_pool(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean of `hidden` [n, tokens, dimensions] over the tokens where `mask` [n, tokens] is 1 → [n, dimensions]."""
    weights = mask.astype(np.float32)
    totals = np.maximum(weights.sum(axis=1, keepdims=True), 1.0)
    return np.asarray(np.einsum("ntd,nt->nd", hidden, weights) / totals)


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Rows of length one; a row of zeros stays zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12))
