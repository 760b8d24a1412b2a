"""ONNX for TensorRT: standard operators, fixed shapes, and real builds of it with TensorRT-RTX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from converters.calibration import calibration_inputs
from converters.errors import ConversionError
from converters.graph import read_graph
from converters.half_from_onnx import half_from_onnx
from converters.int8_from_onnx import int8_from_onnx
from converters.onnx_from_onnx import GraphTarget, onnx_from_onnx, tensorrt_target
from converters.profiles import profiles_of
from converters.stateless_line import input_shapes
from converters.written_out import write_out
from models.manifest import Build, DetectionManifest
from tests.conftest import ROOT
from tests.converters.manifests import detection_manifest, embedding_manifest
from tests.converters.rtx import Shapes, plan_bytes
from tests.converters.test_half_from_onnx import run
from tests.converters.test_plain_from_quantised import cosine
from tests.converters.tiny_onnx import detector, model, save
from tests.models.tasks.conftest import minilm  # noqa: F401  (a fixture)

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
RTX = tensorrt_target("tensorrt_rtx", "1.7.1")


def standard(source: Path, folder: Path, manifest: Any, target: GraphTarget = RTX) -> Path:
    for name in ("scratch", "engine"):
        (folder / name).mkdir(parents=True)
    onnx_from_onnx(source, {}, folder / "scratch", folder / "engine", manifest, target)
    assert [path.name for path in (folder / "scratch").iterdir()] == ["model.onnx"]
    return folder / "engine" / "model.onnx"


def input_sizes(path: Path) -> dict[str, list[int]]:
    return {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in onnx.load(str(path)).graph.input}


def test_shapes_are_fixed_as_far_as_the_manifest_says(tmp_path: Path) -> None:
    source, manifest = save(tmp_path / "m.onnx", detector()), detection_manifest()
    assert input_sizes(standard(source, tmp_path / "one", manifest)) == {"pixel_values": [1, 3, 32, 48]}
    several = replace(manifest, build=Build(batch_max=4))
    assert input_sizes(standard(source, tmp_path / "four", several)) == {"pixel_values": [0, 3, 32, 48]}
    with pytest.raises(ConversionError, match="has 32 where 64 is needed"):
        standard(source, tmp_path / "other", detection_manifest(height=64))


def test_opsets_are_held_against_what_a_parser_reads(tmp_path: Path) -> None:
    value = detector()
    value.opset_import[0].version = 18
    source = save(tmp_path / "m.onnx", value)
    with pytest.raises(ConversionError, match="opset 18; the TensorRT here reads up to 17"):
        standard(source, tmp_path / "old", detection_manifest(), tensorrt_target("tensorrt", "8.5.2.2"))
    standard(source, tmp_path / "new", detection_manifest(), tensorrt_target("tensorrt", "10.3.0"))
    assert tensorrt_target("tensorrt", "12.0").opset_max >= tensorrt_target("tensorrt", "11.4.0.106").opset_max
    assert tensorrt_target("tensorrt", "unknown").opset_max == 17


def test_operators_of_onnx_runtime_are_refused_by_name(tmp_path: Path) -> None:
    value = model(
        [helper.make_node("FusedMatMul", ["input_ids_f", "w"], ["last_hidden_state"], domain="com.microsoft", alpha=2.0)],
        {"input_ids": (INT64, ["N", 4])},
        {"last_hidden_state": (FLOAT, ["N", 4])},
        {"w": np.eye(4, dtype=np.float32)},
    )
    value.graph.node.insert(0, helper.make_node("Cast", ["input_ids"], ["input_ids_f"], to=FLOAT))
    value.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ConversionError, match=r"com\.microsoft\.FusedMatMul"):
        standard(save(tmp_path / "m.onnx", value), tmp_path / "out", embedding_manifest())


@pytest.mark.parametrize("opset", [17, 18])
def test_layer_normalisation_written_out(tmp_path: Path, opset: int) -> None:
    rng = np.random.default_rng(0)
    weights = {"s": rng.standard_normal(8).astype(np.float32), "b": rng.standard_normal(8).astype(np.float32)}
    nodes = [helper.make_node("LayerNormalization", ["x", "s", "b"], ["y"], name="norm", epsilon=1e-3)]
    value = model(nodes, {"x": (FLOAT, ["N", 3, 8])}, {"y": (FLOAT, ["N", 3, 8])}, weights)
    value.opset_import[0].version = opset
    source, target = save(tmp_path / "m.onnx", value), tmp_path / "out.onnx"
    graph = read_graph(source)
    write_out(graph, frozenset({"LayerNormalization"}))
    onnx.checker.check_model(graph.model, full_check=True)
    save(target, graph.model)
    assert "LayerNormalization" not in {node.op_type for node in graph.nodes}
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    assert np.allclose(run(source, x=x)[0], run(target, x=x)[0], atol=1e-5)
    with pytest.raises(ConversionError, match="Softmax cannot be written out"):
        write_out(graph, frozenset({"Softmax"}))


def conveyor() -> DetectionManifest:
    from tests.converters.pictures import shipped_detector

    return shipped_detector("conveyor-detr")


def test_the_detr_of_the_demo_builds_in_each_precision(tmp_path: Path) -> None:
    graph = standard(ROOT / "models" / "weights" / "conveyor_detr.onnx", tmp_path, conveyor())
    half, int8 = tmp_path / "half.onnx", tmp_path / "int8.onnx"
    half_from_onnx(graph, half, with_attention=True)
    int8_from_onnx(graph, int8, calibration_inputs(conveyor(), graph, None, count=4), "minmax")
    (profile,) = profiles_of(input_shapes(graph), conveyor())
    shapes: Shapes = {name: (least, usual, most) for name, (least, usual, most) in profile.items()}
    assert shapes["pixel_values"] == ([1, 3, 192, 320], [4, 3, 192, 320], [4, 3, 192, 320])
    sizes = [plan_bytes(path, shapes) for path in (graph, half, int8)]
    assert min(sizes) > 100_000


def test_int8_weights_of_an_encoder_go_to_tensorrt(tmp_path: Path, minilm: Path) -> None:  # noqa: F811  (the fixture)
    """MiniLM, as shipped with int8 weights: plain for 8.5, half for RTX, with the vectors of the original."""
    source = minilm / "model.onnx"
    manifest = embedding_manifest(dimensions=384, max_tokens=256)
    old = standard(source, tmp_path / "old", manifest, tensorrt_target("tensorrt", "8.5.2.2"))
    plain = standard(source, tmp_path / "rtx", manifest)
    assert "LayerNormalization" not in {node.op_type for node in onnx.load(str(old)).graph.node}
    half = tmp_path / "half.onnx"
    half_from_onnx(plain, half)
    assert half.stat().st_size < plain.stat().st_size * 0.55
    ids = np.random.default_rng(0).integers(1000, 20_000, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 7:] = 0
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    (expected,) = run(source, **feed)
    for path, least in ((old, 0.999999), (plain, 0.999999), (half, 0.9999)):
        (found,) = run(path, **feed)
        assert cosine(found, expected) > least, path
    shapes: Shapes = {name: ([1, 4], [1, 32], [4, 64]) for name in feed}
    assert plan_bytes(half, shapes) > 20_000_000
