"""Each family of graphs that a shipped manifest names, in each precision that stands in a graph, by the real parser and builder.

DEIMv2 in `test_half_from_onnx.py`, `test_int8_from_onnx.py` and `tensorrt/test_plan.py`, DETR and a real encoder in
`test_standard_graph.py`, decoders in `tensorrt/test_decoder.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from converters.half_from_onnx import half_from_onnx
from converters.int8_from_onnx import int8_from_onnx
from converters.onnx_from_onnx import onnx_from_onnx, tensorrt_target
from converters.profiles import profiles_of
from converters.stateless_line import input_shapes
from models.manifest import ClassificationManifest, DetectionManifest
from tests.converters.exported import DETECTORS, exported
from tests.converters.tensorrt.graphs import encoder
from tests.converters.tensorrt.process import build, request
from tests.converters.transformers.tiny_models import HEIGHT, WIDTH, detection_facts, manifest_for

rtx = pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module", params=DETECTORS)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector in ONNX's own operators, as a build hands it to rounding and to the builder."""
    folder = tmp_path_factory.mktemp(request.param)
    scratch, written = folder / "scratch", folder / "written"
    for each in (scratch, written):
        each.mkdir()
    manifest = manifest_for("detection", **detection_facts(request.param))
    assert isinstance(manifest, DetectionManifest)
    source = exported(request.param, folder / "model.onnx")
    onnx_from_onnx(source, {}, scratch, written, manifest, tensorrt_target("tensorrt_rtx", rtx.__version__))
    return written / "model.onnx"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_detector_with_deformable_attention_becomes_a_plan(graph: Path, precision: str, tmp_path: Path) -> None:
    rounded = graph
    if precision == "int8":
        random = np.random.default_rng(0)
        inputs = [{"pixel_values": random.random((1, 3, HEIGHT, WIDTH), np.float32)} for _ in range(2)]
        rounded = tmp_path / "int8.onnx"
        int8 = int8_from_onnx(graph, rounded, inputs, form="signed")
        assert 20 < int8.nodes < int8.candidates
    if precision != "fp32":
        rounded, unrounded = tmp_path / "half.onnx", rounded
        half = half_from_onnx(unrounded, rounded)
        assert half.halved > half.nodes / 2
    operators = {node.op_type for node in onnx.load(str(rounded)).graph.node}
    assert "GridSample" in operators and ("QuantizeLinear" in operators) == (precision == "int8")
    assert_builds(rounded, tmp_path, precision, optimization_level=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_encoder_becomes_a_plan(precision: str, tmp_path: Path) -> None:
    graph, rounded = encoder(tmp_path / "model.onnx"), tmp_path / "rounded.onnx"
    if precision == "fp16":
        half_from_onnx(graph, rounded)
    elif precision == "int8":
        ids = np.random.default_rng(0).integers(0, 100, (1, 16))
        int8 = int8_from_onnx(graph, rounded, [{"input_ids": ids, "attention_mask": np.ones_like(ids)}])
        half_from_onnx(rounded, rounded, peaks=int8.peaks)
    sizes = [[1, 1], [2, 16], [4, 32]]
    profiles = [{"input_ids": sizes, "attention_mask": sizes}]
    assert_builds(graph if precision == "fp32" else rounded, tmp_path, precision, profiles=profiles)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_mobilebert_becomes_a_plan(precision: str, tmp_path: Path) -> None:
    """Bottlenecks, stacked feed-forward parts, and NoNorm (a scale and a shift) where others have LayerNorm."""
    for each in ("scratch", "written"):
        (tmp_path / each).mkdir()
    manifest = manifest_for("classification")
    assert isinstance(manifest, ClassificationManifest)
    target = tensorrt_target("tensorrt_rtx", rtx.__version__)
    onnx_from_onnx(exported("mobilebert", tmp_path / "model.onnx"), {}, tmp_path / "scratch", tmp_path / "written", manifest, target)
    graph = tmp_path / "written" / "model.onnx"
    rounded, shapes = tmp_path / "rounded.onnx", input_shapes(graph)
    if precision == "fp16":
        half = half_from_onnx(graph, rounded)
        assert half.halved > half.nodes / 2
    elif precision == "int8":
        ids = np.random.default_rng(0).integers(0, 200, (1, 16))
        int8 = int8_from_onnx(graph, rounded, [{name: ids if name == "input_ids" else np.ones_like(ids) for name in shapes}])
        assert 10 < int8.nodes < int8.candidates
        half_from_onnx(rounded, rounded, peaks=int8.peaks)
    profiles = profiles_of(shapes, manifest)
    assert_builds(graph if precision == "fp32" else rounded, tmp_path, precision, profiles=profiles, optimization_level=0)


def assert_builds(graph: Path, folder: Path, precision: str, **more: Any) -> None:
    ended = build(request(graph, folder / "model.plan", precision="fp32" if precision == "fp32" else "typed", **more))
    assert ended.result["layers"] > 0 and (folder / "model.plan").stat().st_size == ended.result["size_bytes"]
