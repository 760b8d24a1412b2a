"""From logits to tokens: pure functions on arrays, one row per sequence.

A sequence draws exactly one uniform number per token from its own generator, so its tokens do not depend on who runs beside it.
Nucleus (top-p) sampling: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751. Penalties: as the OpenAI API defines them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Mapping, Optional, Sequence, Tuple

import numpy as np

# Nearly every nucleus lies in so many of the most probable tokens; sorting these instead of the vocabulary is ten times faster.
NUCLEUS_GUESSES = (512, 4096)
# Probabilities are added up in blocks of so many before one block is looked at.
BLOCK = 256
MAX_BIASES, MAX_BIAS = 1024, 100.0

Logprobs = Tuple[Tuple[int, float], ...]


@dataclass(frozen=True)
class Sampling:
    """How one sequence chooses its tokens.

    temperature   0 is greedy; then top_p, top_k and seed have no meaning
    top_k         0: all tokens
    top_logprobs  -1: none wanted; n: log probability of the chosen token and of the n most probable ones
    logit_bias    (token, what is added to its logit)
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: Optional[int] = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int = -1
    logit_bias: Tuple[Tuple[int, float], ...] = ()

    def problem(self) -> Optional[str]:
        """What is wrong with the values, or None."""
        checks = [
            (0.0 <= self.temperature <= 100.0, f"temperature is {self.temperature}, must be from 0 to 100"),
            (0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}, must be over 0 and at most 1"),
            (self.top_k >= 0, f"top_k is {self.top_k}, must not be negative"),
            (self.seed is None or self.seed >= 0, f"seed is {self.seed}, must not be negative"),
            (-2.0 <= self.presence_penalty <= 2.0, f"presence_penalty is {self.presence_penalty}, must be from -2 to 2"),
            (-2.0 <= self.frequency_penalty <= 2.0, f"frequency_penalty is {self.frequency_penalty}, must be from -2 to 2"),
            (-1 <= self.top_logprobs <= 20, f"top_logprobs is {self.top_logprobs}, must be from -1 to 20"),
            (len(self.logit_bias) <= MAX_BIASES, f"logit_bias has {len(self.logit_bias)} tokens, more than {MAX_BIASES}"),
            (
                all(token >= 0 and -MAX_BIAS <= bias <= MAX_BIAS for token, bias in self.logit_bias),
                f"logit_bias has a negative token id or a bias that is not from {-MAX_BIAS:g} to {MAX_BIAS:g}",
            ),
        ]
        return next((reason for is_right, reason in checks if not is_right), None)


def choose(
    logits: np.ndarray,
    samplings: Sequence[Sampling],
    counts: Sequence[Mapping[int, int]],
    generators: Sequence[np.random.Generator],
    allowed: Sequence[Optional[np.ndarray]] = (),
) -> np.ndarray:
    """One token per row of `logits` float32 [n, vocabulary] → int64 [n].

    counts   how often each token was generated so far
    allowed  bool [vocabulary] of rows that may not choose every token; at least one must be true

    Raises ValueError with the row number if a row is not finite: the model or its runtime is broken.
    """
    tokens: np.ndarray = logits.argmax(axis=1)
    peaks = np.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    if not np.isfinite(peaks).all():
        raise ValueError(f"the logits of row {int(np.flatnonzero(~np.isfinite(peaks))[0])} are not finite")
    for row, sampling in enumerate(samplings):
        own = logits[row]
        scores = adjust(own, sampling, counts[row], allowed[row] if allowed else None)
        if sampling.temperature > 0:
            tokens[row] = draw(scores, sampling, float(generators[row].random()))
        elif scores is not own:
            tokens[row] = scores.argmax()
    return tokens


def adjust(scores: np.ndarray, sampling: Sampling, counts: Mapping[int, int], allowed: Optional[np.ndarray] = None) -> np.ndarray:
    """One row of scores with its biases, less frequency_penalty · count and presence_penalty where count > 0, and -inf where a token is
    not allowed. The very array if nothing changes."""
    is_penalised = bool(counts) and bool(sampling.presence_penalty or sampling.frequency_penalty)
    if not (is_penalised or sampling.logit_bias or allowed is not None):
        return scores
    scores = scores.copy() if allowed is None else np.where(allowed, scores, np.float32(-np.inf))
    if sampling.logit_bias:
        tokens, biases = zip(*sampling.logit_bias)
        np.add.at(scores, np.array(tokens), np.array(biases, np.float32))
    if is_penalised:
        said = np.fromiter(counts.keys(), np.int64, len(counts))
        times = np.fromiter(counts.values(), np.float32, len(counts))
        scores[said] -= np.float32(sampling.frequency_penalty) * times + np.float32(sampling.presence_penalty)
    return scores


def draw(scores: np.ndarray, sampling: Sampling, uniform: float) -> int:
    """Draw from one row of scores [vocabulary]: temperature, then top-k, then top-p of what is left; `uniform` lies in [0, 1)."""
    peak = scores.max()
    if 0 < sampling.top_k < len(scores):
        candidates = _largest(scores, sampling.top_k)
        weights = _weights(scores[candidates], peak, sampling.temperature)
    elif sampling.top_p < 1.0:
        candidates, weights = _nucleus(scores, _weights(scores, peak, sampling.temperature), sampling.top_p)
    else:
        return _draw_any(_weights(scores, peak, sampling.temperature), uniform)
    cumulative = np.cumsum(weights, dtype=np.float64)
    if sampling.top_p < 1.0:
        cumulative = cumulative[: int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1])) + 1]
    return int(candidates[_place(cumulative, uniform * cumulative[-1])])


def log_probabilities(logits: np.ndarray, tokens: Sequence[int], samplings: Sequence[Sampling]) -> List[Optional[Logprobs]]:
    """For each row that wants them: (chosen token, its log probability), then the top ones in order. Of the model, before penalties."""
    return [
        None if sampling.top_logprobs < 0 else _row_log_probabilities(row, int(token), sampling.top_logprobs)
        for row, token, sampling in zip(logits, tokens, samplings)
    ]


def _row_log_probabilities(row: np.ndarray, token: int, count: int) -> Logprobs:
    peak = row.max()
    normaliser = float(peak) + float(np.log(np.exp((row - peak).astype(np.float64)).sum()))
    top = _largest(row, min(count, len(row))) if count else np.empty(0, np.int64)
    return tuple((int(index), float(row[index]) - normaliser) for index in [token, *top.tolist()])


def _nucleus(scores: np.ndarray, weights: np.ndarray, top_p: float) -> Tuple[np.ndarray, np.ndarray]:
    """(token ids, their weights), the most probable first, with at least those that top-p keeps."""
    whole = weights.sum(dtype=np.float64)
    for guess in NUCLEUS_GUESSES:
        candidates = _largest(scores, guess)
        rest = whole - weights[candidates].sum(dtype=np.float64)
        if guess < len(scores) and rest <= (1.0 - top_p) * whole:
            # What lies outside the guess still counts as mass: it is put behind, where top-p cuts it off.
            return np.append(candidates, candidates[-1]), np.append(weights[candidates].astype(np.float64), max(rest, 0.0))
    candidates = _largest(scores, len(scores))
    return candidates, weights[candidates]


def _draw_any(weights: np.ndarray, uniform: float) -> int:
    whole = len(weights) // BLOCK * BLOCK
    sums = np.append(weights[:whole].reshape(-1, BLOCK).sum(axis=1, dtype=np.float64), weights[whole:].sum(dtype=np.float64))
    edges = np.cumsum(sums)
    target = uniform * edges[-1]
    block = _place(edges, target)
    return block * BLOCK + _place(
        np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64), target - (edges[block] - sums[block])
    )


def _place(cumulative: np.ndarray, target: float) -> int:
    """The first index whose cumulated weight is over `target`; where rounding leaves none, the last one with a weight of its own."""
    index = int(np.searchsorted(cumulative, target, side="right"))
    return index if index < len(cumulative) else int(np.searchsorted(cumulative, cumulative[-1]))


def _weights(scores: np.ndarray, peak: float, temperature: float) -> np.ndarray:
    """Unnormalised probabilities, float32."""
    with np.errstate(under="ignore"):
        return np.asarray(np.exp((scores - np.float32(peak)) * np.float32(1 / max(temperature, 1e-6))))


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, largest first; of equals the smaller index first."""
    if count < len(scores):
        threshold = scores[np.argpartition(scores, -count)[-count:]].min()
        indices = np.flatnonzero(scores >= threshold)
    else:
        indices = np.arange(len(scores))
    return np.asarray(indices[np.argsort(-scores[indices], kind="stable")][:count])
