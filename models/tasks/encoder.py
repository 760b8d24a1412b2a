"""Running a text encoder over sequences of token ids: truncation, batches of similar length, padding and mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterator, List, Sequence, Tuple

import numpy as np

from models.engines import Engine, EngineError

# Rows · longest row of one pass: bounds the memory of activations whatever is asked.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class EncoderBatch:
    """One pass: `values` is the asked output [rows, …] for the sequences numbered `indices`; `mask` [rows, tokens] marks real tokens."""

    indices: Tuple[int, ...]
    values: np.ndarray
    mask: np.ndarray


def truncate(sequences: Sequence[Sequence[int]], max_tokens: int) -> Tuple[List[Sequence[int]], Tuple[int, ...]]:
    """Sequences of at most `max_tokens`, and the indices of those that were cut. The last token, an encoder's closing mark, is kept.

    Raises ValueError for an empty sequence.
    """
    empty = next((index for index, tokens in enumerate(sequences) if not len(tokens)), None)
    if empty is not None:
        raise ValueError(f"sequence {empty} has no tokens")
    cut = tuple(index for index, tokens in enumerate(sequences) if len(tokens) > max_tokens)
    kept = [tokens if len(tokens) <= max_tokens else [*tokens[: max_tokens - 1], tokens[-1]] for tokens in sequences]
    return kept, cut


def encode(engine: Engine, sequences: Sequence[Sequence[int]], output: str, batch_tokens: int = BATCH_TOKENS) -> Iterator[EncoderBatch]:
    """Run `engine` over all sequences in batches of similar length. Raises EngineError.

    Fills the inputs that the engine has of `input_ids`, `attention_mask` and `token_type_ids`, in the integer type that it asks for.
    """
    if output not in {spec.name for spec in engine.outputs}:
        raise EngineError(f"the encoder has no output {output!r}; its outputs are {', '.join(spec.name for spec in engine.outputs)}")
    for indices in _batches([len(tokens) for tokens in sequences], batch_tokens):
        ids, mask = _padded([sequences[index] for index in indices])
        values = engine.run(_inputs(engine, ids, mask))[output]
        yield EncoderBatch(indices, values, mask)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[Tuple[int, ...]]:
    batch: List[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield tuple(batch)
            batch = []
        batch.append(index)
    if batch:
        yield tuple(batch)


def _padded(sequences: Sequence[Sequence[int]]) -> Tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


def _inputs(engine: Engine, ids: np.ndarray, mask: np.ndarray) -> Dict[str, np.ndarray]:
    known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    inputs: Dict[str, np.ndarray] = {}
    for spec in engine.inputs:
        if spec.name not in known:
            raise EngineError(f"the encoder wants an input {spec.name!r}; known are {', '.join(known)}")
        inputs[spec.name] = known[spec.name].astype(spec.dtype, copy=False)
    return inputs
