from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from converters.errors import ConversionError
from converters.graph import Graph
from converters.half_from_onnx import fp32_nodes, half_from_onnx, to_half
from converters.sensitive_nodes import attention_nodes
from tests.converters.pictures import closeness, coco_pictures, shipped_detector
from tests.converters.rtx import plan_bytes
from tests.converters.tiny_onnx import model, save

FLOAT = TensorProto.FLOAT


def run(path: Path, **feed: Any) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, feed)
    return outputs


def halved(tmp_path: Path, value: Any, **options: Any) -> tuple[Path, Any]:
    """The half precision graph of a model, checked with its types, and what it consists of."""
    target = tmp_path / "half.onnx"
    half_from_onnx(save(tmp_path / "source.onnx", value), target, **options)
    onnx.checker.check_model(str(target), full_check=True)
    return target, onnx.load(str(target))


def types(value: Any) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(value, strict_mode=True).graph
    return {each.name: each.type.tensor_type.elem_type for each in (*inferred.value_info, *inferred.input, *inferred.output)}


def product(weight: Any, *more: Any, **constants: Any) -> Any:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product"), *more]
    last = nodes[-1].output[0]
    return model(nodes, {"x": (FLOAT, ["N", 4])}, {last: (FLOAT, ["N", "M"])}, {"w": np.asarray(weight, np.float32), **constants})


def test_weights_are_halved_and_the_border_stays(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3))
    path, value = halved(tmp_path, product(weight))
    assert [each.data_type for each in value.graph.initializer] == [TensorProto.FLOAT16]
    x = np.random.default_rng(1).standard_normal((5, 4), np.float32)
    (y,) = run(path, x=x)
    assert y.dtype == np.float32
    assert 0 < np.abs(y - x @ weight).max() < 0.01


def test_a_weight_beyond_half_precision_keeps_its_node(tmp_path: Path) -> None:
    weight = np.full((4, 3), 1.0)
    weight[2, 1] = 70_000
    source = save(tmp_path / "m.onnx", product(weight, helper.make_node("Relu", ["y"], ["z"])))
    half = half_from_onnx(source, tmp_path / "half.onnx")
    assert half.out_of_range == ("product",)
    assert half.halved == 1
    (z,) = run(tmp_path / "half.onnx", x=np.full((1, 4), 0.5, np.float32))
    assert np.isfinite(z).all()


def test_fills_of_masks_become_the_lowest_value_there_is() -> None:
    lowest = float(np.finfo(np.float32).min)
    assert to_half(np.array([lowest, -1e30, -np.inf, 2], np.float32)).tolist() == [-65504, -65504, -np.inf, 2]


def test_a_written_out_normalisation_stays_in_float32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("ReduceMean", ["a"], ["mean"], name="mean", axes=[-1]),
        helper.make_node("Sub", ["a", "mean"], ["d"], name="centre"),
        helper.make_node("Mul", ["d", "d"], ["dd"], name="square"),
        helper.make_node("ReduceMean", ["dd"], ["v"], name="variance", axes=[-1]),
        helper.make_node("Add", ["v", "epsilon"], ["ve"], name="floor"),
        helper.make_node("Sqrt", ["ve"], ["s"], name="root"),
        helper.make_node("Div", ["d", "s"], ["n"], name="normalise"),
        helper.make_node("MatMul", ["n", "w"], ["y"], name="last"),
    ]
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((64, 64)).astype(np.float32), "epsilon": np.array(1e-12, np.float32)}
    value = model(nodes, {"x": (FLOAT, ["N", 64])}, {"y": (FLOAT, ["N", 64])}, weights)
    path, found = halved(tmp_path, value)
    kinds = types(found)
    assert all(kinds[name] == FLOAT for name in ("mean", "d", "dd", "v", "ve", "s", "n"))
    assert kinds["a"] == TensorProto.FLOAT16
    # Rounded squares would overflow: (300 · 8)² is beyond 65504.
    x = (rng.standard_normal((3, 64)) * 300).astype(np.float32)
    (expected,), (y,) = run(tmp_path / "source.onnx", x=x), run(path, x=x)
    assert np.abs(y - expected).max() < 0.05


def test_one_minus_epsilon_stays_below_one(tmp_path: Path) -> None:
    """Inverse sigmoid, as DETRs write it: with 1 - 1e-5 rounded to one its logarithm is infinite."""
    nodes = [
        helper.make_node("Clip", ["x", "low", "high"], ["c"]),
        helper.make_node("Sub", ["one", "c"], ["rest"]),
        helper.make_node("Div", ["c", "rest"], ["odds"]),
        helper.make_node("Log", ["odds"], ["logit"]),
        helper.make_node("MatMul", ["logit", "w"], ["y"]),
    ]
    weights = {"low": 1e-5, "high": 1 - 1e-5, "one": 1.0, "w": np.eye(4)}
    constants = {name: np.asarray(values, np.float32) for name, values in weights.items()}
    value = model(nodes, {"x": (FLOAT, [1, 4])}, {"y": (FLOAT, [1, 4])}, constants)
    path, _ = halved(tmp_path, value)
    x = np.array([[0.0, 0.3, 0.999995, 1.0]], np.float32)
    (expected,), (y,) = run(tmp_path / "source.onnx", x=x), run(path, x=x)
    assert np.abs(y - expected).max() < 0.01


def attention() -> Any:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"], name="query"),
        helper.make_node("Transpose", ["x"], ["k"], name="key", perm=[1, 0]),
        helper.make_node("MatMul", ["q", "k"], ["raw"], name="scores"),
        helper.make_node("Div", ["raw", "scale"], ["scaled"], name="scale"),
        helper.make_node("Softmax", ["scaled"], ["share"], name="softmax"),
        helper.make_node("MatMul", ["share", "x"], ["mixed"], name="mix"),
        helper.make_node("MatMul", ["mixed", "w"], ["y"], name="last"),
    ]
    weights = {"w": np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32), "scale": np.array(2.8, np.float32)}
    return model(nodes, {"x": (FLOAT, ["N", 8])}, {"y": (FLOAT, ["N", 8])}, weights)


def test_attention_is_found_and_kept_when_asked(tmp_path: Path) -> None:
    assert {"scores", "scale", "softmax", "mix"} <= attention_nodes(Graph(attention()))
    assert not {"query", "last"} & attention_nodes(Graph(attention()))
    _, value = halved(tmp_path, attention())
    assert types(value)["share"] == TensorProto.FLOAT16
    path, value = halved(tmp_path, attention(), with_attention=True)
    kinds = types(value)
    assert kinds["share"] == kinds["raw"] == kinds["mixed"] == FLOAT
    assert kinds["q"] == TensorProto.FLOAT16
    x = np.random.default_rng(1).standard_normal((6, 8), np.float32)
    (expected,), (y,) = run(tmp_path / "source.onnx", x=x), run(path, x=x)
    assert np.abs(y - expected).max() < 0.05


def test_named_and_loud_nodes_are_kept(tmp_path: Path) -> None:
    _, value = halved(tmp_path, attention(), keeps_fp32=["que*"])
    assert types(value)["q"] == FLOAT
    _, value = halved(tmp_path, attention(), peaks={"raw": 50_000.0, "mixed": float("nan"), "q": 3.0})
    kinds = types(value)
    assert kinds["raw"] == kinds["mixed"] == FLOAT
    assert kinds["q"] == TensorProto.FLOAT16
    assert "scores" in fp32_nodes(save(tmp_path / "m.onnx", attention()), with_attention=True)


def test_branches_stay_whole(tmp_path: Path) -> None:
    """The branches of an If read a halved value of the outside."""

    def branch(operator: str) -> Any:
        output = helper.make_tensor_value_info(f"{operator}_y", FLOAT, None)
        return helper.make_graph([helper.make_node(operator, ["a"], [f"{operator}_y"])], operator, [], [output])

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("If", ["yes"], ["b"], then_branch=branch("Neg"), else_branch=branch("Abs")),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    value = model(
        nodes,
        {"x": (FLOAT, [2, 4]), "yes": (TensorProto.BOOL, [])},
        {"y": (FLOAT, [2, 4])},
        {"w": np.eye(4, dtype=np.float32) * 2},
    )
    path, _ = halved(tmp_path, value)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert np.allclose(run(path, x=x, yes=np.array(True))[0], -4 * x)
    assert np.allclose(run(path, x=x, yes=np.array(False))[0], 4 * x)


def test_constants_and_casts_take_the_types_around_them(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=helper.make_tensor("v", FLOAT, [1], [0.25])),
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Cast", ["ids"], ["ids_f"], to=FLOAT),
        helper.make_node("Mul", ["x", "two"], ["x2"]),
        helper.make_node("Add", ["x2", "ones"], ["x3"]),
        helper.make_node("Add", ["x3", "ids_f"], ["x4"]),
        helper.make_node("Cast", ["x4"], ["x5"], to=FLOAT),
        helper.make_node("MatMul", ["x5", "w"], ["y"]),
    ]
    value = model(
        nodes,
        {"x": (FLOAT, [2, 4]), "ids": (TensorProto.INT64, [2, 4])},
        {"y": (FLOAT, [2, 4])},
        {"w": np.eye(4, dtype=np.float32)},
    )
    path, _ = halved(tmp_path, value)
    x, ids = np.arange(8, dtype=np.float32).reshape(2, 4), np.arange(8).reshape(2, 4)
    assert np.allclose(run(path, x=x, ids=ids)[0], 2 * x + 0.25 + ids, rtol=1e-3)


def test_operators_of_a_runtime_and_old_opsets_are_refused(tmp_path: Path) -> None:
    value = product(np.eye(4))
    value.graph.node[0].domain = "com.microsoft"
    value.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ConversionError, match=r"com\.microsoft\.MatMul"):
        half_from_onnx(save(tmp_path / "m.onnx", value), tmp_path / "half.onnx")
    value = product(np.eye(4))
    value.opset_import[0].version = 11
    with pytest.raises(ConversionError, match="opset 11"):
        half_from_onnx(save(tmp_path / "m.onnx", value), tmp_path / "half.onnx")


def test_a_real_detector_finds_the_same_boxes_and_builds(tmp_path: Path, test_data: Path) -> None:
    source, target = test_data / "models" / "deimv2_hgnetv2_femto_coco_raw.onnx", tmp_path / "half.onnx"
    half = half_from_onnx(source, target)
    assert half.halved > half.nodes / 2
    assert target.stat().st_size < source.stat().st_size * 0.6
    close = closeness(shipped_detector("deimv2-femto"), source, target, coco_pictures(test_data, 8))
    assert close.matched == 1
    assert close.worst < 0.06
    assert plan_bytes(target, {"pixel_values": ([1, 3, 416, 416], [1, 3, 416, 416], [2, 3, 416, 416])}) > 1_000_000
