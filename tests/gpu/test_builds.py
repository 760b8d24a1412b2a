"""Whole builds with their gate on the GPU: plans of TensorRT in each precision, and the providers of ONNX Runtime."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from agent.engine_options import engine_options
from converters.build import Built, build
from converters.request import parse_request
from converters.verify_onnx import open_source, overlap
from models.catalog import load_catalog
from models.conveyor import Conveyor
from models.device import Device
from models.engines import Engine, EngineOptions, open_engine
from models.engines.onnx_providers import PROVIDERS
from models.manifest import DetectionManifest
from models.record import from_mapping, to_mapping
from models.tasks.detection import Detector
from tests.conftest import ROOT

CONVEYOR = ROOT / "models" / "weights" / "conveyor_detr.onnx"


def run(store: Path, **options: Any) -> Built:
    """The demo's detector, built and proven."""
    manifest = to_mapping(load_catalog().find("conveyor-detr"))
    values = {"manifest": manifest, "sources": {"model": str(CONVEYOR)}, "store": str(store)}
    asked = json.dumps({**values, "options": {"python": sys.executable, **options}})
    return build(parse_request(asked.encode()), lambda phase, fraction, message: None)


def opened(store: Path, built: Built) -> Engine:
    """As the worker opens it."""
    node = {"threads": 2, "slots": 4, "context_tokens": 64, "cache_folder": str(store / "provider")}
    return open_engine(built.engine.folder, from_mapping(EngineOptions, engine_options(node, to_mapping(built.engine.record))))


def compare(engine: Engine) -> None:
    """What is sure in pictures of the belt, against the source on the CPU; several runs, for what is bound or captured by the first."""
    manifest = load_catalog().find("conveyor-detr")
    assert isinstance(manifest, DetectionManifest)
    source = open_source(CONVEYOR, 4)
    expected, found = Detector(source, manifest), Detector(engine, manifest)
    belt, compared = Conveyor(seed=3), 0
    for index in range(6):
        picture = belt.frame(2.0 * index)
        wanted, got = (sorted(each.detect(picture), key=lambda box: (box.label, box.x0)) for each in (expected, found))
        assert [box.label for box in got] == [box.label for box in wanted]
        assert all(abs(one.score - other.score) < 0.05 and overlap(one, other) > 0.9 for one, other in zip(wanted, got, strict=True))
        compared += len(wanted)
    assert compared
    for each in (engine, source):
        each.close()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_plan_is_built_proven_and_opened(gpu: Device, tensorrt: str, precision: str, tmp_path: Path) -> None:
    built = run(tmp_path, target=tensorrt, precision=precision)
    record = built.engine.record
    assert (record.verdict["passed"], record.key.device) == (True, gpu.key)
    assert record.verdict["inputs"] >= 16
    assert run(tmp_path, target=tensorrt, precision=precision).is_reused
    compare(opened(tmp_path, built))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_proves_what_it_serves(gpu: Device, provider: str, precision: str, tmp_path: Path) -> None:
    if PROVIDERS[provider][0] not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {PROVIDERS[provider][0]}")
    built = run(tmp_path, provider=provider, precision=precision)
    record = built.engine.record
    assert (record.verdict["passed"], record.key.options["provider"], record.key.device) == (True, provider, gpu.key)
    made = sorted(path.name for path in (tmp_path / "provider").rglob("*.engine"))
    assert bool(made) == (provider == "tensorrt")
    engine = opened(tmp_path, built)
    assert engine.provider == provider
    compare(engine)
    assert sorted(path.name for path in (tmp_path / "provider").rglob("*.engine")) == made, (
        "the engine that was proven is the one that serves"
    )
