"""The graphs that stand in for torch elsewhere are those that the exporter writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.converters.exported import DETECTORS, MODELS, exported, thinned
from tests.converters.transformers.exported import export_now
from tests.converters.transformers.tiny_models import HEIGHT, WIDTH

pytest.importorskip("torch")


@pytest.mark.parametrize("model_type", MODELS)
def test_the_kept_graph_is_what_the_exporter_writes_now(model_type: str, tmp_path: Path) -> None:
    kept, now = exported(model_type, tmp_path / "kept.onnx"), tmp_path / "now.onnx"
    onnx.save(thinned(export_now(model_type, tmp_path)), str(now))
    ours, theirs = (onnx.load(str(path)).graph for path in (kept, now))
    renew = "python -m tests.converters.transformers.exported writes it anew"
    assert {node.op_type for node in ours.node} == {node.op_type for node in theirs.node}, renew
    assert list(ours.input) == list(theirs.input) and list(ours.output) == list(theirs.output), renew
    random = np.random.default_rng(3)
    inputs: dict[str, np.ndarray[Any, Any]] = {"pixel_values": random.random((1, 3, HEIGHT, WIDTH), np.float32)}
    if model_type not in DETECTORS:
        ids = random.integers(0, 200, (2, 16))
        inputs = {value.name: ids if value.name == "input_ids" else np.ones_like(ids) for value in ours.input}
    for found, expected in zip(_answers(kept, inputs), _answers(now, inputs), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=renew)


def _answers(graph: Path, inputs: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return [np.asarray(each) for each in session.run(None, inputs)]
