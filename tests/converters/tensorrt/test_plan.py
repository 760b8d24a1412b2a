"""Plans that TensorRT-RTX really builds, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from converters.tensorrt_from_onnx.progress import BUILT, PARSED
from tests.conftest import ROOT
from tests.converters.tensorrt.graphs import convolutions, encoder
from tests.converters.tensorrt.process import Ended, build, request

pytest.importorskip("tensorrt_rtx")

BELT = ROOT / "models" / "weights" / "conveyor_detr.onnx"
BELT_PROFILE = {"pixel_values": [[1, 3, 192, 320], [1, 3, 192, 320], [4, 3, 192, 320]]}
RTX_MARK = b"vtrt"


def assert_whole(ended: Ended, plan: Path) -> None:
    result = ended.result
    assert plan.read_bytes()[:4] == RTX_MARK
    assert plan.stat().st_size == result["size_bytes"] > 1000
    assert result["layers"] > 0 and result["dla_layers"] is None
    assert [file.name for file in plan.parent.iterdir() if file.name.startswith(".")] == []


def test_a_detector_becomes_a_plan_and_progress_only_rises(tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    ended = build(request(BELT, plan, profiles=[BELT_PROFILE], precision="fp32"))
    assert_whole(ended, plan)
    fractions = [line["fraction"] for line in ended.progress]
    assert fractions == sorted(fractions) and fractions[0] == 0.0 and fractions[-1] < 1.0
    assert list(dict.fromkeys(line["phase"] for line in ended.progress)) == ["load", "parse", "build", "write"]
    # More than its beginning and end: TensorRT's own phases came through.
    assert any(PARSED < fraction < BUILT for fraction in fractions)


def test_deimv2_becomes_a_plan(tmp_path: Path, test_data: Path) -> None:
    plan = tmp_path / "model.plan"
    shape = [1, 3, 416, 416]
    source = test_data / "models" / "deimv2_hgnetv2_femto_coco_raw.onnx"
    assert_whole(build(request(source, plan, profiles=[{"pixel_values": [shape, shape, shape]}])), plan)


def test_an_encoder_has_dynamic_shapes_and_several_profiles(tmp_path: Path) -> None:
    source, plan = encoder(tmp_path / "encoder.onnx"), tmp_path / "model.plan"
    short, long = [[1, 1], [1, 16], [1, 32]], [[1, 32], [4, 64], [8, 128]]
    profiles = [{"input_ids": sizes, "attention_mask": sizes} for sizes in (short, long)]
    assert_whole(build(request(source, plan, profiles=profiles, precision="tf32")), plan)


def test_half_precision_comes_from_the_graph(tmp_path: Path) -> None:
    full, half = tmp_path / "full.plan", tmp_path / "half.plan"
    assert_whole(build(request(convolutions(tmp_path / "full.onnx"), full, precision="fp32")), full)
    assert_whole(build(request(convolutions(tmp_path / "half.onnx", np.float16), half, precision="typed")), half)
    assert half.read_bytes() != full.read_bytes()


def test_eight_bits_come_from_quantise_nodes(tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    source = convolutions(tmp_path / "int8.onnx", is_quantised=True)
    assert_whole(build(request(source, plan, precision="typed")), plan)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_flags_are_refused_where_the_version_has_none(tmp_path: Path, precision: str) -> None:
    error = build(request(convolutions(tmp_path / "a.onnx"), tmp_path / "model.plan", precision=precision)).error
    assert error["code"] == "unsupported"
    assert "TensorRT-RTX 1." in error["message"] and "typed" in error["message"]


def test_a_rebuilt_plan_replaces_the_old_one(tmp_path: Path) -> None:
    source, plan = convolutions(tmp_path / "a.onnx"), tmp_path / "model.plan"
    plan.write_bytes(b"old")
    assert_whole(build(request(source, plan)), plan)


def test_an_accelerator_that_is_not_there_is_refused(tmp_path: Path) -> None:
    error = build(request(convolutions(tmp_path / "a.onnx"), tmp_path / "model.plan", dla_core=0)).error
    assert error["code"] == "unsupported" and "sees 0 DLA cores" in error["message"]


def python38() -> str | None:
    """A Python 3.8 with numpy and TensorRT-RTX, as HOTSPARE_TEST_PYTHON38 names it."""
    for candidate in (os.environ.get("HOTSPARE_TEST_PYTHON38"), shutil.which("python3.8")):
        if candidate and subprocess.run([candidate, "-c", "import numpy, tensorrt_rtx"], capture_output=True).returncode == 0:
            return candidate
    return None


def test_the_converter_runs_under_python_38(tmp_path: Path) -> None:
    python = python38()
    if python is None:
        pytest.skip("no Python 3.8 with numpy and tensorrt_rtx; name one in HOTSPARE_TEST_PYTHON38")
    plan = tmp_path / "model.plan"
    assert_whole(build(request(BELT, plan, profiles=[BELT_PROFILE]), python=python), plan)


def test_it_needs_neither_onnx_nor_onnxruntime(tmp_path: Path) -> None:
    """On a device it runs under an interpreter that has numpy and TensorRT alone."""
    program = "import sys, json; import converters.tensorrt_from_onnx.__main__; print(json.dumps(sorted(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"onnx", "onnxruntime", "pydantic", "anyio", "tokenizers"} & set(json.loads(loaded))
