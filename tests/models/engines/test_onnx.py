from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, save_model

from models.engines import EngineError, EngineOptions, open_engine, open_generation_engine
from models.engines.cache import plan_rows
from models.engines.free_memory import available_bytes, memory_refusal
from tests.models.engines.tiny_decoder import write_tiny_decoder


@pytest.fixture
def scaler(tmp_path: Path) -> Path:
    """A model that doubles `pixel_values` float32 [?, 3]."""
    value = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3])
    doubled = helper.make_tensor_value_info("doubled", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node("Add", ["pixel_values"] * 2, ["doubled"])], "scaler", [value], [doubled])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    save_model(model, str(tmp_path / "model.onnx"))
    return tmp_path


def test_runs_a_stateless_model(scaler: Path) -> None:
    engine = open_engine(scaler, EngineOptions(threads=1))
    assert engine.inputs[0].shape == (-1, 3)
    inputs = np.arange(12, dtype=np.float32).reshape(3, 4).T[:, :3]
    np.testing.assert_array_equal(engine.run({"pixel_values": inputs})["doubled"], inputs * 2)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run({"pixel_values": inputs})


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, r"'pixel_values' float32\[\?, 3\] is missing"),
        ({"pixels": np.zeros((1, 3), np.float32)}, "no input 'pixels'; its inputs are pixel_values"),
        ({"pixel_values": np.zeros((1, 3))}, "is float64, the model takes float32"),
        ({"pixel_values": np.zeros((1, 4), np.float32)}, r"shape \[1, 4\], the model takes \[\?, 3\]"),
    ],
)
def test_wrong_inputs_are_named(scaler: Path, inputs: dict[str, np.ndarray], reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        open_engine(scaler, EngineOptions(threads=1)).run(inputs)


def test_a_provider_that_is_not_there_is_an_error(scaler: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(EngineError, match="needs CUDAExecutionProvider, this ONNX Runtime has only"):
        open_engine(scaler, EngineOptions(provider="cuda"))
    with pytest.raises(EngineError, match="unknown provider 'rocm'"):
        open_engine(scaler, EngineOptions(provider="rocm"))


def test_an_absent_or_broken_artefact_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not exist"):
        open_engine(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(EngineError, match="cannot be opened"):
        open_engine(tmp_path)


def test_the_context_is_bounded_by_the_model(tmp_path: Path) -> None:
    engine = open_generation_engine(write_tiny_decoder(tmp_path), EngineOptions(slots=2, context_tokens=100_000, threads=1))
    assert engine.context_tokens == 256


def test_generation_json_that_disagrees_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_decoder(tmp_path)
    facts = json.loads((folder / "generation.json").read_text())
    for change, reason in (
        ({"layers": 3}, "expected input past_key_values.2.key"),
        ({"head_dim": 8}, r"past_key_values.0.key float32\[\?, 2, \?, 8\]"),
        ({"vocabulary": 0}, "vocabulary is 0, must be a positive integer"),
        ({"eos_ids": [5000]}, "token id 5000"),
    ):
        (folder / "generation.json").write_text(json.dumps({**facts, **change}))
        with pytest.raises(EngineError, match=reason):
            open_generation_engine(folder, EngineOptions(slots=1, context_tokens=16, threads=1))


def test_a_cache_that_does_not_fit_is_refused_with_the_figure(tmp_path: Path) -> None:
    folder = write_tiny_decoder(tmp_path)
    with pytest.raises(EngineError, match=r"MiB of KV cache \(100000000 slots of 256 tokens\).*MiB are free"):
        open_generation_engine(folder, EngineOptions(slots=100_000_000, context_tokens=256))
    assert memory_refusal(1 << 30, 1 << 30, 4, 2048, (2 << 30) + (256 << 20)) is None
    assert "1024 MiB of KV cache" in str(memory_refusal(1 << 30, 1 << 30, 4, 2048, 2 << 30))
    assert memory_refusal(1 << 50, 1 << 50, 4, 2048, None) is None
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:       64 kB\n")
    assert available_bytes(tmp_path / "meminfo") == 65536
    assert available_bytes(tmp_path / "absent") is None


def test_rows_are_gathered_with_the_fewest_tokens_moved() -> None:
    assert plan_rows([1, 2], [9, 9, 9, 9]) == (1, [])
    assert plan_rows([2, 0], [50, 0, 60, 70]) == (1, [(0, 1)])
    assert plan_rows([0, 1, 3], [500, 400, 0, 30]) == (0, [(3, 2)])
    assert plan_rows([0, 3], [10, 5, 5, 900])[0] == 2
