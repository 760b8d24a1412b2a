"""What each `--precision` gives on each target: the name of what was published, or that it is refused, by whole builds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from converters.build import build
from converters.errors import ConversionError
from converters.native_from_causal_model import find_compiler
from converters.request import parse_request
from models.catalog import load_catalog
from models.record import to_mapping
from tests.conftest import ROOT
from tests.converters.manifests import generation, request
from tests.converters.tiny_gguf import Recipe, write_decoder
from tests.converters.tiny_transformers import write_model

CONVEYOR = ROOT / "models" / "weights" / "conveyor_detr.onnx"
ASKED = ("auto", "fp32", "fp16", "int8", "int4")
GENTLE = "int8 with activations in fp32"
NONE = "refused"

# (source, target) → what comes of ASKED. A GGUF's blocks of four bits stay as they are whatever is asked.
DECODERS = {
    ("gguf", "onnxruntime"): ("fp32", "fp32", NONE, "int8", "int4"),
    ("safetensors", "onnxruntime"): ("fp32", "fp32", NONE, "int8", "int4"),
    ("gguf", "native"): ("fp32", "fp32", NONE, "int8", "int4"),
    ("safetensors", "native"): (GENTLE, NONE, NONE, "int8", "int4"),
    ("gguf", "tensorrt_rtx"): ("fp16", "fp32", "fp16", "int8", "int4"),
    ("safetensors", "tensorrt_rtx"): ("fp16", "fp32", "fp16", "int8", "int4"),
}
DETECTORS = {"onnxruntime": ("fp32", "fp32", "fp16", "int8", NONE), "tensorrt_rtx": ("fp16", "fp32", "fp16", "int8", NONE)}
# Plans take seconds each: those whose graphs no other test builds are in every run.
QUICK_PLANS = frozenset({("safetensors", "int8"), ("safetensors", "int4"), ("detector", "int8")})


def cases(table: Mapping[Any, tuple[str, ...]]) -> list[Any]:
    found = []
    for row, names in table.items():
        source, target = row if isinstance(row, tuple) else ("detector", row)
        for asked, name in zip(ASKED, names, strict=True):
            is_slow = target == "tensorrt_rtx" and name != NONE and (source, asked) not in QUICK_PLANS
            is_slow = is_slow or (asked != "auto" and name == names[0])  # shows what `auto` shows
            found.append(
                pytest.param(source, target, asked, name, marks=[pytest.mark.slow] if is_slow else [], id=f"{source}-{target}-{asked}")
            )
    return found


def outcome(value: dict[str, Any], target: str, precision: str) -> tuple[str, Mapping[str, Any], Path]:
    """Name of the precision published or `refused`, its attempt, its folder."""
    if target == "tensorrt_rtx":
        pytest.importorskip("tensorrt_rtx")
    if target == "native" and find_compiler() is None:
        pytest.skip("no C compiler")
    options = {"target": target, "precision": precision, "accept_unverified": target == "tensorrt_rtx", "nice": 0}
    try:
        engine = build(parse_request(json.dumps({**value, "options": options}).encode()), lambda phase, fraction, message: None).engine
    except ConversionError as error:
        assert error.code == "unsupported", error
        return NONE, {}, Path()
    (attempt,) = engine.record.verdict["attempts"]
    assert attempt["status"] == ("not run" if target == "tensorrt_rtx" else "passed")
    return attempt["precision"], attempt, engine.folder


@pytest.mark.usefixtures("caching_compiler")
@pytest.mark.parametrize(("source", "target", "asked", "name"), cases(DECODERS))
def test_a_decoder(source: str, target: str, asked: str, name: str, tmp_path: Path) -> None:
    if source == "gguf":
        value = request(generation(context_tokens=64), tmp_path / "store", model=write_decoder(tmp_path / "tiny.gguf", Recipe()))
    else:
        files = write_model(tmp_path / "model")
        manifest = {**generation(context_tokens=64), "format": "transformers"}
        manifest["files"] = {f"file{index}": {"source": f"file:/nowhere/{each}"} for index, each in enumerate(files)}
        value = request(manifest, tmp_path / "store", **{f"file{index}": path for index, path in enumerate(files.values())})
    value["manifest"]["generation"]["mean_kl"] = 0.2
    published, attempt, folder = outcome(value, target, asked)
    assert published == name
    if attempt.get("figures"):
        # Rounding shows, and only where something was rounded.
        is_rounded = name in ("int8", GENTLE) or (name, source) == ("int4", "safetensors")
        assert (attempt["figures"]["mean_kl"] > 2e-6) is is_rounded, attempt["figures"]
    if name == "int4" and target == "onnxruntime":
        graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
        assert any(node.op_type == "MatMulNBits" for node in graph.node)


@pytest.mark.parametrize(("source", "target", "asked", "name"), cases(DETECTORS))
def test_a_detector(source: str, target: str, asked: str, name: str, tmp_path: Path) -> None:
    manifest = to_mapping(load_catalog().find("conveyor-detr"))
    if asked == "int8":
        manifest["detection"]["max_score_delta"] = 0.2  # what int8 costs this one stands in `test_int8_from_onnx.py`
    published, attempt, _ = outcome(request(manifest, tmp_path / "store", model=CONVEYOR), target, asked)
    assert published == name
    if name == "int8":
        assert 0 < attempt["notes"]["int8_nodes"] < attempt["notes"]["int8_candidates"]
    if name == "fp16":
        assert attempt["notes"]["halved"] > attempt["notes"]["nodes"] / 2
