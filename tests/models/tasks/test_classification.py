from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from models.engines import EngineError, EngineOptions, open_engine
from models.manifest import Classification
from models.tasks.classification import classify, softmax, top_labels
from tests.models.tasks.tiny_encoder import DIMENSIONS, TABLE, write_tiny_encoder

FACTS = Classification(labels=tuple("abcdef"), max_tokens=8)


@pytest.mark.parametrize("dtype", [TensorProto.INT64, TensorProto.INT32])
def test_logits_come_in_the_order_of_the_texts_and_padding_does_not_count(tmp_path: Path, dtype: int) -> None:
    engine = open_engine(write_tiny_encoder(tmp_path, dtype=dtype), EngineOptions(threads=1))
    sequences = [[3, 4, 5, 6, 7], [8], list(range(10, 30)), [9, 9]]
    result = classify(engine, FACTS, sequences)
    cut = [*range(10, 17), 29]
    expected = np.stack([TABLE[tokens].sum(axis=0) for tokens in (sequences[0], sequences[1], cut, sequences[3])])
    np.testing.assert_allclose(result.logits, expected, atol=1e-5)
    assert result.truncated == (2,)


def test_top_labels_are_ordered_probabilities() -> None:
    logits = np.array([[0, 3, 1], [1000, 0, 999]], np.float32)
    np.testing.assert_allclose(softmax(logits).sum(axis=1), [1, 1], rtol=1e-6)
    best = top_labels(logits, ["x", "y", "z"], 2)
    assert [[item.label for item in row] for row in best] == [["y", "z"], ["x", "z"]]
    assert best[1][0].score == pytest.approx(0.7310586)


def test_a_manifest_that_does_not_fit_the_model_is_an_error(tmp_path: Path) -> None:
    engine = open_engine(write_tiny_encoder(tmp_path), EngineOptions(threads=1))
    with pytest.raises(EngineError, match=f"has shape \\[1, {DIMENSIONS}\\], the manifest names 2 labels"):
        classify(engine, Classification(labels=("a", "b"), max_tokens=8), [[1]])
    with pytest.raises(EngineError, match="no output 'scores'; its outputs are last_hidden_state, logits"):
        classify(engine, Classification(labels=("a", "b"), max_tokens=8, output="scores"), [[1]])
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        classify(engine, FACTS, [[1], []])
