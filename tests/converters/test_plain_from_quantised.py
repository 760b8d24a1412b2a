from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from converters.errors import ConversionError
from converters.int8_from_onnx import int8_from_onnx
from converters.plain_from_quantised import dequantised, is_quantised, plain_from_quantised
from tests.converters.test_half_from_onnx import run
from tests.converters.test_int8_from_onnx import convolutions, feeds
from tests.converters.tiny_onnx import model, save

FLOAT, INT8, UINT8 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8
RNG = np.random.default_rng(11)


def node(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes)


def cosine(one: Any, other: Any) -> float:
    return float(np.sum(one * other) / (np.linalg.norm(one) * np.linalg.norm(other)))


def plain(tmp_path: Path, value: Any) -> tuple[Path, Path]:
    source, target = save(tmp_path / "quantised.onnx", value), tmp_path / "plain.onnx"
    plain_from_quantised(source, target)
    found = onnx.load(str(target))
    onnx.checker.check_model(found, full_check=True)
    assert not is_quantised(found)
    assert {each.domain for each in found.graph.node} == {""}
    return source, target


def test_dynamic_quantisation_as_the_quantizer_of_onnx_runtime_writes_it(tmp_path: Path) -> None:
    """MatMulInteger with a zero point per column, its scales multiplied first, a bias behind."""
    weight = RNG.integers(0, 255, (16, 6)).astype(np.uint8)
    scale, zero = RNG.uniform(0.001, 0.02, 6).astype(np.float32), RNG.integers(100, 150, 6).astype(np.uint8)
    bias = RNG.standard_normal(6).astype(np.float32)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("MatMulInteger", ["xq", "w", "xz", "wz"], ["sum"]),
        node("Cast", ["sum"], ["float_sum"], to=FLOAT),
        node("Mul", ["xs", "ws"], ["scales"]),
        node("Mul", ["float_sum", "scales"], ["product"]),
        node("Add", ["product", "b"], ["y"]),
    ]
    value = model(nodes, {"x": (FLOAT, ["N", 16])}, {"y": (FLOAT, ["N", 6])}, {"w": weight, "wz": zero, "ws": scale, "b": bias})
    source, target = plain(tmp_path, value)
    x = RNG.standard_normal((9, 16)).astype(np.float32)
    (before,), (after,) = run(source, x=x), run(target, x=x)
    assert np.allclose(after, x @ ((weight.astype(np.float32) - zero) * scale) + bias, atol=1e-5)
    assert 0.999 < cosine(before, after) < 1
    operators = [each.op_type for each in onnx.load(str(target)).graph.node]
    assert operators == ["MatMul", "Add"]


def test_dynamically_quantised_convolutions(tmp_path: Path) -> None:
    weight = RNG.integers(-127, 127, (4, 3, 3, 3)).astype(np.int8)
    scale = RNG.uniform(0.001, 0.02, (1, 4, 1, 1)).astype(np.float32)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("ConvInteger", ["xq", "w", "xz"], ["sum"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Cast", ["sum"], ["float_sum"], to=FLOAT),
        node("Mul", ["xs", "ws"], ["scales"]),
        node("Mul", ["float_sum", "scales"], ["y"]),
    ]
    value = model(nodes, {"x": (FLOAT, [1, 3, 8, 8])}, {"y": (FLOAT, [1, 4, 4, 4])}, {"w": weight, "ws": scale})
    source, target = plain(tmp_path, value)
    x = RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)
    (before,), (after,) = run(source, x=x), run(target, x=x)
    assert cosine(before, after) > 0.999
    floats = onnx.numpy_helper.to_array(next(each for each in onnx.load(str(target)).graph.initializer if len(each.dims) == 4))
    assert np.allclose(floats, weight * scale.reshape(4, 1, 1, 1), rtol=1e-6)


@pytest.mark.parametrize("operator", ["DynamicQuantizeMatMul", "MatMulIntegerToFloat"])
def test_fused_products_of_onnx_runtime(tmp_path: Path, operator: str) -> None:
    weight, scale, bias = RNG.integers(-127, 127, (8, 5)).astype(np.int8), np.float32(0.01), RNG.standard_normal(5).astype(np.float32)
    if operator == "DynamicQuantizeMatMul":
        nodes = [helper.make_node(operator, ["x", "w", "ws", "", "b"], ["y"], domain="com.microsoft")]
    else:
        nodes = [
            node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
            helper.make_node(operator, ["xq", "w", "xs", "ws", "xz", "", "b"], ["y"], domain="com.microsoft"),
        ]
    value = model(nodes, {"x": (FLOAT, ["N", 8])}, {"y": (FLOAT, ["N", 5])}, {"w": weight, "ws": np.array([scale]), "b": bias})
    value.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    source, target = plain(tmp_path, value)
    x = RNG.standard_normal((7, 8)).astype(np.float32)
    (before,), (after,) = run(source, x=x), run(target, x=x)
    assert np.allclose(after, x @ (weight * scale) + bias, atol=1e-5)
    assert cosine(before, after) > 0.999


def test_tables_are_looked_up_as_floats(tmp_path: Path) -> None:
    table = RNG.integers(0, 255, (20, 4)).astype(np.uint8)
    nodes = [
        node("Gather", ["table", "ids"], ["rows"]),
        node("DequantizeLinear", ["rows", "s", "z"], ["floats"]),
        node("DequantizeLinear", ["w", "ws"], ["wf"], axis=1),
        node("MatMul", ["floats", "wf"], ["y"]),
    ]
    weights = {
        "table": table,
        "s": np.array(0.02, np.float32),
        "z": np.array(128, np.uint8),
        "w": RNG.integers(-127, 127, (4, 3)).astype(np.int8),
        "ws": np.array([0.1, 0.01, 0.001], np.float32),
    }
    value = model(nodes, {"ids": (TensorProto.INT64, ["N"])}, {"y": (FLOAT, ["N", 3])}, weights)
    source, target = plain(tmp_path, value)
    ids = np.array([3, 19, 0])
    assert np.allclose(run(source, ids=ids)[0], run(target, ids=ids)[0], atol=1e-5)


@pytest.mark.parametrize("form", ["signed", "unsigned"])
def test_pairs_around_operators_go(tmp_path: Path, form: Any) -> None:
    """What `int8_from_onnx` made is plain again, up to the rounding of its weights."""
    source, int8, target = save(tmp_path / "m.onnx", convolutions()), tmp_path / "int8.onnx", tmp_path / "plain.onnx"
    int8_from_onnx(source, int8, feeds(), "minmax", form=form, keeps_ends=False)
    plain_from_quantised(int8, target)
    assert not is_quantised(onnx.load(str(target)))
    feed = feeds(1)[0]
    assert cosine(run(source, **feed)[0], run(target, **feed)[0]) > 0.9999


def test_blocks_and_axes_of_dequantisation() -> None:
    values = np.arange(12, dtype=np.int8).reshape(3, 4)
    scale = np.array([[1, 10], [2, 20], [3, 30]], np.float32)
    found = dequantised(values, scale, None, axis=1, block=2)
    assert found.tolist() == [[0, 1, 20, 30], [8, 10, 120, 140], [24, 27, 300, 330]]
    assert dequantised(values, np.array([1, 2, 3], np.float32), np.array([0, 1, 2], np.int8), axis=0)[1].tolist() == [6, 8, 10, 12]


def test_other_forms_are_refused_in_words(tmp_path: Path) -> None:
    value = model([node("QLinearMatMul", ["x"], ["y"])], {"x": (UINT8, ["N"])}, {"y": (UINT8, ["N"])}, {})
    with pytest.raises(ConversionError, match=r"QLinearMatMul.*before quantisation"):
        plain_from_quantised(save(tmp_path / "m.onnx", value), tmp_path / "plain.onnx")
    computed = model([node("DequantizeLinear", ["x", "s"], ["y"])], {"x": (INT8, ["N"]), "s": (FLOAT, [])}, {"y": (FLOAT, ["N"])}, {})
    with pytest.raises(ConversionError, match="computed scale s;"):
        plain_from_quantised(save(tmp_path / "m.onnx", computed), tmp_path / "plain.onnx")
