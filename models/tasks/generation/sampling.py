"""From logits to tokens: pure functions on arrays, one row per sequence.

A sequence draws exactly one uniform number per token from its own generator, so its tokens do not depend on who runs beside it.
Nucleus (top-p) sampling: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751. Penalties: as the OpenAI API defines them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Mapping, Optional, Sequence, Tuple

import numpy as np

# Nearly every nucleus lies in so many of the most probable tokens; sorting these instead of the vocabulary is ten times faster.
NUCLEUS_GUESS = 512

Logprobs = Tuple[Tuple[int, float], ...]


@dataclass(frozen=True)
class Sampling:
    """How one sequence chooses its tokens.

    temperature   0 is greedy; then top_p, top_k and seed have no meaning
    top_k         0: all tokens
    top_logprobs  -1: none wanted; n: log probability of the chosen token and of the n most probable ones
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: Optional[int] = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int = -1

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
        ]
        return next((reason for is_right, reason in checks if not is_right), None)


def choose(
    logits: np.ndarray, samplings: Sequence[Sampling], counts: Sequence[Mapping[int, int]], generators: Sequence[np.random.Generator]
) -> np.ndarray:
    """One token per row of `logits` float32 [n, vocabulary] → int64 [n]. `counts`: how often each token was generated so far.

    Raises ValueError with the row number if a row is not finite: the model or its runtime is broken.
    """
    scores = penalise(logits, samplings, counts)
    tokens: np.ndarray = scores.argmax(axis=1)
    peaks = np.take_along_axis(scores, tokens[:, None], axis=1)[:, 0]
    if not np.isfinite(peaks).all():
        raise ValueError(f"the logits of row {int(np.flatnonzero(~np.isfinite(peaks))[0])} are not finite")
    for row, sampling in enumerate(samplings):
        if sampling.temperature > 0:
            tokens[row] = draw(scores[row], sampling, float(generators[row].random()))
    return tokens


def penalise(logits: np.ndarray, samplings: Sequence[Sampling], counts: Sequence[Mapping[int, int]]) -> np.ndarray:
    """Logits less frequency_penalty · count, less presence_penalty where count > 0. The very array if nothing is penalised."""
    penalised = logits
    for row, sampling in enumerate(samplings):
        if counts[row] and (sampling.presence_penalty or sampling.frequency_penalty):
            if penalised is logits:
                penalised = logits.copy()
            tokens = np.fromiter(counts[row].keys(), np.int64, len(counts[row]))
            times = np.fromiter(counts[row].values(), np.float32, len(counts[row]))
            penalised[row, tokens] -= np.float32(sampling.frequency_penalty) * times + np.float32(sampling.presence_penalty)
    return penalised


def draw(scores: np.ndarray, sampling: Sampling, uniform: float) -> int:
    """Draw from one row of scores [vocabulary]: temperature, then top-k, then top-p of what is left; `uniform` lies in [0, 1)."""
    candidates, weights = _candidates(scores, sampling)
    cumulative = np.cumsum(weights)
    if sampling.top_p < 1.0:
        kept = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1])) + 1
        cumulative = cumulative[:kept]
    index = min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), len(cumulative) - 1)
    return int(index if candidates is None else candidates[index])


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


def _candidates(scores: np.ndarray, sampling: Sampling) -> Tuple[Optional[np.ndarray], np.ndarray]:
    """(token ids most probable first, their unnormalised probabilities float64); ids None: all tokens in their own order."""
    peak = scores.max()
    if 0 < sampling.top_k < len(scores):
        candidates = _largest(scores, sampling.top_k)
        return candidates, _weights(scores[candidates], peak, sampling.temperature)
    weights = _weights(scores, peak, sampling.temperature)
    if sampling.top_p >= 1.0:
        return None, weights
    candidates = _largest(scores, min(NUCLEUS_GUESS, len(scores)))
    if weights[candidates].sum() < sampling.top_p * weights.sum():
        candidates = _largest(scores, len(scores))
        return candidates, weights[candidates]
    # What lies outside the guess still counts as mass: it is put behind, where top-p cuts it off.
    rest = weights.sum() - weights[candidates].sum()
    return np.append(candidates, candidates[-1]), np.append(weights[candidates], max(rest, 0.0))


def _weights(scores: np.ndarray, peak: float, temperature: float) -> np.ndarray:
    with np.errstate(under="ignore"):
        return np.asarray(np.exp((scores.astype(np.float64) - float(peak)) / temperature))


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, largest first; of equals the smaller index first."""
    if count < len(scores):
        threshold = scores[np.argpartition(scores, -count)[-count:]].min()
        indices = np.flatnonzero(scores >= threshold)
    else:
        indices = np.arange(len(scores))
    return np.asarray(indices[np.argsort(-scores[indices], kind="stable")][:count])
