from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.engines import EngineError, EngineOptions, open_engine
from models.manifest import Embedding
from models.tasks.embedding import embed, normalise
from models.tasks.encoder import encode
from tests.models.tasks.tiny_encoder import DIMENSIONS, TABLE, write_tiny_encoder

SEQUENCES = [[1, 5, 2], [1, 6, 7, 8, 2], [1, 2]]


def facts(**changes: object) -> Embedding:
    return Embedding(**{"dimensions": DIMENSIONS, "max_tokens": 4, "normalise": False, **changes})  # type: ignore[arg-type]  # the callers name fields


@pytest.mark.parametrize("inputs", [("input_ids",), ("input_ids", "attention_mask"), ("input_ids", "attention_mask", "token_type_ids")])
def test_the_mean_is_taken_over_real_tokens_only(tmp_path: Path, inputs: tuple[str, ...]) -> None:
    engine = open_engine(write_tiny_encoder(tmp_path, inputs), EngineOptions(threads=1))
    result = embed(engine, facts(), SEQUENCES)
    expected = np.stack([TABLE[tokens].mean(axis=0) for tokens in ([1, 5, 2], [1, 6, 7, 2], [1, 2])])
    np.testing.assert_allclose(result.vectors, expected, atol=1e-6)
    assert result.truncated == (1,)


def test_first_pooling_and_length_one(tmp_path: Path) -> None:
    engine = open_engine(write_tiny_encoder(tmp_path), EngineOptions(threads=1))
    vectors = embed(engine, facts(pooling="first", normalise=True), [[5, 2], [6]]).vectors
    np.testing.assert_allclose(vectors, TABLE[[5, 6]] / np.linalg.norm(TABLE[[5, 6]], axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(normalise(np.zeros((1, 3), np.float32)), np.zeros((1, 3)))


def test_batches_are_bounded_whatever_is_asked(tmp_path: Path) -> None:
    engine = open_engine(write_tiny_encoder(tmp_path), EngineOptions(threads=1))
    lengths = np.random.default_rng(1).integers(1, 40, 100).tolist()
    batches = list(encode(engine, [[3] * length for length in lengths], "logits", batch_tokens=64))
    assert sorted(index for batch in batches for index in batch.indices) == list(range(100))
    assert max(batch.mask.size for batch in batches) <= 64
    assert embed(engine, facts(), []).vectors.shape == (0, DIMENSIONS)


def test_a_manifest_that_does_not_fit_the_model_is_an_error(tmp_path: Path) -> None:
    engine = open_engine(write_tiny_encoder(tmp_path), EngineOptions(threads=1))
    with pytest.raises(EngineError, match="the manifest says \\[n, tokens, 384\\]"):
        embed(engine, facts(dimensions=384), SEQUENCES)
    odd = open_engine(write_tiny_encoder(tmp_path / "odd", ("input_ids", "pixels")), EngineOptions(threads=1))
    with pytest.raises(EngineError, match="wants an input 'pixels'"):
        embed(odd, facts(), SEQUENCES)
