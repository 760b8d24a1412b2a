"""Exported graphs through the real parser and builder of TensorRT-RTX, in float32, half precision and int8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from converters.half_from_onnx import half_from_onnx
from converters.int8_from_onnx import int8_from_onnx
from converters.onnx_from_onnx import onnx_from_onnx, tensorrt_target
from converters.onnx_from_transformers import onnx_from_transformers
from converters.profiles import profiles_of
from models.manifest import DetectionManifest, GenerationManifest
from tests.converters.tensorrt.process import build, request
from tests.converters.transformers.tiny_models import (
    HEIGHT,
    WIDTH,
    detection_facts,
    files_of,
    manifest_for,
    save_detector,
    save_encoder,
)

pytest.importorskip("torch")
rtx = pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("model_type", ["detr", "rt_detr", "d_fine", "bert"])
def test_a_plan_is_built(model_type: str, precision: str, tmp_path: Path) -> None:
    source, folder, scratch = (tmp_path / name for name in ("source", "engine", "scratch"))
    if model_type == "bert":
        save_encoder(model_type, source, is_classifier=True)
        manifest = manifest_for("classification")
    else:
        save_detector(model_type, source)
        manifest = manifest_for("detection", **detection_facts(model_type))
    assert not isinstance(manifest, GenerationManifest)
    exported = onnx_from_transformers(files_of(source), manifest, tmp_path / "model.onnx", 17, lambda fraction, message: None)
    for each in (folder, scratch):
        each.mkdir()
    onnx_from_onnx(exported, {}, scratch, folder, manifest, tensorrt_target("tensorrt_rtx", rtx.__version__))
    graph, rounded = folder / "model.onnx", folder / "rounded.onnx"
    if precision == "fp16":
        assert half_from_onnx(graph, rounded).halved
    elif precision == "int8":
        assert int8_from_onnx(graph, rounded, _inputs(graph), form="signed").nodes
    built = rounded if rounded.exists() else graph
    shapes = {value.name: [side.dim_value for side in value.type.tensor_type.shape.dim] for value in onnx.load(str(built)).graph.input}
    if isinstance(manifest, DetectionManifest) and manifest.detection.resize == "stretch":
        assert shapes == {"pixel_values": [1, 3, HEIGHT, WIDTH]}
    ended = build(request(built, tmp_path / "model.plan", profiles=profiles_of(shapes, manifest), precision="typed"))
    assert ended.result["layers"] > 0 and (tmp_path / "model.plan").stat().st_size == ended.result["size_bytes"]


def _inputs(graph: Path) -> list[Mapping[str, Any]]:
    rng = np.random.default_rng(0)
    fed: list[Mapping[str, Any]] = []
    for _ in range(2):
        values: dict[str, Any] = {}
        for value in onnx.load(str(graph)).graph.input:
            if value.name == "pixel_values":
                sides = [side.dim_value or size for side, size in zip(value.type.tensor_type.shape.dim, (1, 3, 224, 192), strict=True)]
                values[value.name] = rng.random(sides, np.float32)
            else:
                values[value.name] = np.ones((1, 16), np.int64) if value.name != "input_ids" else rng.integers(2, 200, (1, 16))
        fed.append(values)
    return fed
