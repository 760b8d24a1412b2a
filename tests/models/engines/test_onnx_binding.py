"""Bound inputs and outputs against `session.run`: the same session, with the CPU's memory in the place of a GPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save_model

from models.engines import EngineOptions, TensorSpec, open_engine
from models.engines.onnx import OnnxEngine
from models.engines.onnx_binding import SHAPES_KEPT, Bindings


def graph(folder: Path, rows: int | str) -> Path:
    """`doubled` [rows, 3] = 2 * `pixels`, `mean` [3] over its rows, `large` [found, 2] where it is above 1."""
    mean = numpy_helper.from_array(np.array([0], np.int64), "first")
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    nodes = [
        helper.make_node("Add", ["pixels", "pixels"], ["doubled"]),
        helper.make_node("ReduceMean", ["pixels", "first"], ["mean"], keepdims=0),
        helper.make_node("Greater", ["pixels", "one"], ["is_large"]),
        helper.make_node("NonZero", ["is_large"], ["places"]),
        helper.make_node("Transpose", ["places"], ["large"]),
    ]
    made = helper.make_graph(
        nodes,
        "all",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [rows, 3])],
        [
            helper.make_tensor_value_info("doubled", TensorProto.FLOAT, [rows, 3]),
            helper.make_tensor_value_info("mean", TensorProto.FLOAT, [3]),
            helper.make_tensor_value_info("large", TensorProto.INT64, ["found", 2]),
        ],
        [mean, one],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 8
    save_model(model, str(folder / "model.onnx"))
    return folder


@pytest.mark.parametrize("rows", [4, "N"])
def test_bound_memory_gives_what_a_plain_run_gives(tmp_path: Path, rows: int | str) -> None:
    engine = open_engine(graph(tmp_path, rows), EngineOptions(threads=1))
    assert isinstance(engine, OnnxEngine)
    bindings = Bindings(engine._session, engine.inputs, engine.outputs, "cpu")
    rng = np.random.default_rng(1)
    for count in (4, 4, 4) if rows == 4 else (1, 4, 2, 4, 1):
        inputs = {"pixels": rng.standard_normal((count, 3)).astype(np.float32)}
        expected, found = engine.run(inputs), bindings.run(inputs)
        assert list(found) == ["doubled", "mean", "large"]
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
            assert found[name].dtype == value.dtype


def test_as_many_shapes_stay_bound_as_were_agreed(tmp_path: Path) -> None:
    engine = open_engine(graph(tmp_path, "N"), EngineOptions(threads=1))
    assert isinstance(engine, OnnxEngine)
    bindings = Bindings(engine._session, engine.inputs, engine.outputs, "cpu")
    for count in (*range(1, SHAPES_KEPT + 5), 1):
        pixels = np.full((count, 3), count, np.float32)
        np.testing.assert_array_equal(bindings.run({"pixels": pixels})["doubled"], 2 * pixels)
    assert len(bindings._bound) == SHAPES_KEPT


def test_an_engine_of_a_gpu_provider_keeps_its_inputs_in_device_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = open_engine(graph(tmp_path, 2), EngineOptions(threads=1))
    assert isinstance(plain, OnnxEngine)
    asked: list[str] = []

    class OnDevice(Bindings):
        def __init__(self, session: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], device: str) -> None:
            asked.append(device)
            super().__init__(session, inputs, outputs, "cpu")

    monkeypatch.setattr("models.engines.onnx.Bindings", OnDevice)
    engine = OnnxEngine(plain._session, "model.onnx", "cuda")
    pixels = np.ones((2, 3), np.float32)
    first = engine.run({"pixels": pixels})["doubled"]
    assert engine.run({"pixels": 2 * pixels})["doubled"] is first, "the same array each time, as the contract allows"
    assert asked == ["cuda"]
