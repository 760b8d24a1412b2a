from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence, Union

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from models.engines import EngineError
from models.engines.tensorrt import TensorRtEngine
from tests.models.engines.fake_cuda import FakeCuda
from tests.models.engines.fake_tensorrt import load_plan, write_plan

Shape = Sequence[Union[int, str]]


def model(inputs: dict[str, tuple[int, Shape]], nodes: Sequence[Any], outputs: dict[str, tuple[int, Shape]]) -> onnx.ModelProto:
    given, wanted = ([helper.make_tensor_value_info(name, *facts) for name, facts in side.items()] for side in (inputs, outputs))
    made = helper.make_model(helper.make_graph(nodes, "tiny", given, wanted), opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    return made


@pytest.fixture
def scaler(tmp_path: Path) -> Path:
    """Doubles `pixel_values` float32 [1..8, 3] and adds `offset` int64 [rows]."""
    nodes = [
        helper.make_node("Add", ["pixel_values"] * 2, ["doubled"]),
        helper.make_node("Add", ["offset", "offset"], ["shifted"]),
    ]
    made = model(
        {"pixel_values": (TensorProto.FLOAT, ["batch", 3]), "offset": (TensorProto.INT64, ["batch"])},
        nodes,
        {"doubled": (TensorProto.FLOAT, ["batch", 3]), "shifted": (TensorProto.INT64, ["batch"])},
    )
    profile = {"pixel_values": [[1, 3], [4, 3], [8, 3]], "offset": [[1], [4], [8]]}
    write_plan(tmp_path / "narrow", made, [profile], narrow=True)
    return write_plan(tmp_path, made, [profile])


def batch(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {"pixel_values": random.standard_normal((rows, 3)).astype(np.float32), "offset": random.integers(-9, 9, rows)}


@pytest.mark.parametrize("device", [FakeCuda(), FakeCuda(is_mapped=True), FakeCuda(can_capture=False)], ids=["graphs", "mapped", "plain"])
def test_runs_batches_of_any_size_in_any_order(scaler: Path, device: FakeCuda) -> None:
    engine = TensorRtEngine(load_plan(scaler), device, captures=True)
    assert (engine.provider, engine.inputs[0].shape, engine.inputs[1].dtype) == ("tensorrt", (-1, 3), "int64")
    for seed, rows in enumerate((2, 2, 2, 8, 8, 1, 2, 2)):
        inputs = batch(rows, seed)
        outputs = engine.run(inputs)
        np.testing.assert_array_equal(outputs["doubled"], inputs["pixel_values"] * 2)
        np.testing.assert_array_equal(outputs["shifted"], inputs["offset"] * 2)
    assert device.captured == (3 if device.can_capture else 0)
    if device.is_mapped:
        assert device.moved == {"up": 0, "down": 0, "rows": 0}
    engine.close()
    assert device.is_closed
    with pytest.raises(EngineError, match="closed"):
        engine.run(batch(1))


def test_strided_inputs_are_taken(scaler: Path) -> None:
    inputs = {"pixel_values": np.arange(12, dtype=np.float32).reshape(3, 4).T[:, :3], "offset": np.arange(8)[::2]}
    outputs = TensorRtEngine(load_plan(scaler), FakeCuda(), captures=True).run(inputs)
    np.testing.assert_array_equal(outputs["doubled"], inputs["pixel_values"] * 2)


def test_int64_goes_into_an_engine_of_int32_where_it_fits(scaler: Path) -> None:
    engine = TensorRtEngine(load_plan(scaler / "narrow"), FakeCuda(), captures=True)
    inputs = batch(3)
    outputs = engine.run(inputs)
    assert outputs["shifted"].dtype == np.int32
    np.testing.assert_array_equal(outputs["shifted"], inputs["offset"] * 2)
    inputs["offset"][1] = 1 << 31
    with pytest.raises(EngineError, match=r"'offset' has values from -?\d+ to 2147483648, the engine takes int32"):
        engine.run(inputs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pixel_values": np.zeros((9, 3), np.float32)}, r"has shape \[9, 3\], the plan was built for \[1, 3\] to \[8, 3\]; convert"),
        ({"pixel_values": np.zeros((2, 3))}, "is float64, the model takes float32"),
        ({"pixels": np.zeros(1)}, "no input 'pixels'"),
    ],
)
def test_wrong_inputs_are_named(scaler: Path, change: dict[str, np.ndarray], reason: str) -> None:
    engine = TensorRtEngine(load_plan(scaler), FakeCuda(), captures=True)
    good = batch(2)
    with pytest.raises(EngineError, match=reason):
        engine.run({**good, **change})
    np.testing.assert_array_equal(engine.run(good)["shifted"], good["offset"] * 2)


@pytest.mark.parametrize("device", [FakeCuda(), FakeCuda(is_mapped=True)], ids=["discrete", "mapped"])
def test_outputs_whose_shape_depends_on_data_are_allocated_while_running(tmp_path: Path, device: FakeCuda) -> None:
    made = model(
        {"values": (TensorProto.FLOAT, ["n"])},
        [helper.make_node("NonZero", ["values"], ["places"])],
        {"places": (TensorProto.INT64, [1, "found"])},
    )
    folder = write_plan(tmp_path, made, [{"values": [[1], [4], [16]]}])
    engine = TensorRtEngine(load_plan(folder), device, captures=True)
    for values in ([0, 1, 0, 1], [1] * 16, [0, 0], [0, 0, 5]):
        outputs = engine.run({"values": np.array(values, np.float32)})
        np.testing.assert_array_equal(outputs["places"][0], np.flatnonzero(values))
    assert device.captured == 0
    engine.close()


def test_values_that_decide_shapes_stay_on_the_host(tmp_path: Path) -> None:
    made = model(
        {"values": (TensorProto.FLOAT, [4]), "shape": (TensorProto.INT64, [2])},
        [helper.make_node("Reshape", ["values", "shape"], ["folded"])],
        {"folded": (TensorProto.FLOAT, ["rows", "columns"])},
    )
    device = FakeCuda()
    engine = TensorRtEngine(load_plan(write_plan(tmp_path, made, [{}], host=["shape"])), device, captures=True)
    for shape in ((2, 2), (4, 1), (1, 4)):
        folded = engine.run({"values": np.arange(4, dtype=np.float32), "shape": np.array(shape)})["folded"]
        assert folded.shape == shape
    assert device.moved["up"] == 3 * 16
    assert device.captured == 0


def test_the_narrowest_profile_is_chosen_and_left_again(tmp_path: Path) -> None:
    made = model(
        {"values": (TensorProto.FLOAT, ["n", 2])},
        [helper.make_node("Neg", ["values"], ["negative"])],
        {"negative": (TensorProto.FLOAT, ["n", 2])},
    )
    folder = write_plan(tmp_path, made, [{"values": [[1, 2]] * 3}, {"values": [[1, 2], [8, 2], [16, 2]]}])
    engine = TensorRtEngine(load_plan(folder), FakeCuda(), captures=True)
    for rows in (1, 1, 16, 1, 2, 2, 2, 1):
        values = np.full((rows, 2), rows, np.float32)
        np.testing.assert_array_equal(engine.run({"values": values})["negative"], -values)


def test_a_run_that_fails_says_what_tensorrt_said(scaler: Path) -> None:
    engine = TensorRtEngine(load_plan(scaler), FakeCuda(), captures=False)
    engine._execution._context.set_input_shape = lambda name, shape: engine._execution._context.refuse("no kernel image is available")
    with pytest.raises(EngineError, match=r"model.plan: input 'pixel_values' cannot have shape \[2, 3\]: no kernel image is available"):
        engine.run(batch(2))
