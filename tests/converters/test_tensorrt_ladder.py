"""Whole builds for TensorRT 8.5, 10.3 and 11.4 down the ladder: our converter, engine and gate, over a TensorRT made of ONNX Runtime.

What the fake cannot show is TensorRT's own arithmetic; that is for `tests/gpu`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.model_view import ladder_of
from converters.build import build
from converters.errors import ConversionError
from converters.request import parse_request
from models.catalog import load_catalog
from models.record import to_mapping
from models.store import open_store
from tests.conftest import ROOT
from tests.converters import fake_device
from tests.converters.manifests import generation, request
from tests.converters.tiny_gguf import Recipe, write_decoder

CONVEYOR = ROOT / "models" / "weights" / "conveyor_detr.onnx"
VERSIONS = ("8.5.2.2", *(pytest.param(version, marks=pytest.mark.slow) for version in ("10.3.0", "11.4.0.106")))
NORM = "model.decoder.0.norms.0.weight"
SENSITIVE = "fp16 with attention and normalisation in fp32"


def asked(store: Path, precision: str = "auto", **build_facts: Any) -> dict[str, Any]:
    manifest = to_mapping(load_catalog().find("conveyor-detr"))
    manifest["build"] = {**manifest["build"], **build_facts}
    return {**request(manifest, store, model=CONVEYOR), "options": {"target": "tensorrt", "precision": precision, "nice": 0}}


def built(value: Mapping[str, Any]) -> dict[str, Any]:
    told: list[float] = []
    done = build(parse_request(json.dumps(value).encode()), lambda phase, fraction, message: told.append(fraction))
    assert told == sorted(told)
    return {**done.engine.record.verdict, "key": done.engine.record.key}


@pytest.mark.parametrize("version", ["8.5.2.2", pytest.param("10.3.0", marks=pytest.mark.slow), "11.4.0.106"])
def test_a_detector_becomes_a_proven_plan(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(tmp_path / "site", monkeypatch, version)
    verdict = built(asked(tmp_path / "store"))
    assert (verdict["passed"], verdict["precision"], verdict["inputs"]) == (True, "fp16", 16)
    assert verdict["figures"]["max_score_delta"] > 0
    key = verdict["key"]
    assert (key.runtime, key.runtime_version) == ("tensorrt", version) and "/sm_" in key.device and key.options["l4t"]
    assert (tmp_path / "store" / "timing" / "tensorrt.cache").exists()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fault_that_pinned_layers_do_not_have_is_followed_by_them(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags: the second step pins; typed graphs: nothing is pinned, so every step in half precision has the fault."""
    fake_device.install(tmp_path / "site", monkeypatch, version, weight=NORM, by=1.05, when="unpinned")
    verdict = built(asked(tmp_path / "store"))
    names = [(attempt["precision"], attempt["status"]) for attempt in verdict["attempts"]]
    if version.startswith("8."):
        assert names == [("fp16", "failed"), (SENSITIVE, "passed")]
        assert verdict["attempts"][1]["notes"]["fp32_layers"] > 0 == verdict["attempts"][0]["notes"]["fp32_layers"]
    else:
        assert names == [("fp16", "failed"), (SENSITIVE, "failed"), ("tf32", "passed")]
    # The graph shows nothing of it: the plan was built once more with inner values as outputs.
    first = verdict["attempts"][0]
    assert "score_delta" in first["reason"] and first["worst"]["relative_error"] > 0.02
    assert "/decoder.0/" in first["worst"]["name"] and "/decoder.0/" in first["worst"]["last_good"], first["worst"]


@pytest.mark.slow
def test_a_fault_at_every_step_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(tmp_path / "site", monkeypatch, "10.3.0", weight=NORM, by=1.05, when="always")
    with pytest.raises(ConversionError) as refusal:
        built(asked(tmp_path / "store", "tf32"))
    assert refusal.value.code == "not_the_same_model" and refusal.value.verdict is not None
    attempts: Any = refusal.value.verdict["attempts"]
    assert [attempt["precision"] for attempt in attempts] == ["tf32", "fp32"]
    assert open_store(tmp_path / "store").engines() == []


def test_a_node_without_a_kernel_is_tried_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(tmp_path / "site", monkeypatch, "10.3.0", fails="*softmax*")
    verdict = built(asked(tmp_path / "store"))
    assert [attempt["status"] for attempt in verdict["attempts"]] == ["failed", "failed", "passed"]
    assert "Could not find any implementation" in verdict["attempts"][0]["reason"] and verdict["precision"] == "tf32"


@pytest.mark.parametrize("version", ["8.5.2.2", pytest.param("10.3.0", marks=pytest.mark.slow)])
def test_int8_has_its_ranges_in_the_graph(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(tmp_path / "site", monkeypatch, version)
    verdict = built(asked(tmp_path / "store", "int8", ranges="minmax"))
    assert [path.name for path in (tmp_path / "store" / "calibration").iterdir()], "the ranges are kept"
    first = verdict["attempts"][0]
    assert first["precision"] == "int8" and first["notes"]["int8_nodes"] > 0 and first["figures"], first


def test_a_decoder_becomes_a_proven_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(tmp_path / "site", monkeypatch, "10.3.0")
    source = write_decoder(tmp_path / "tiny.gguf", Recipe())
    verdict = built(
        {**request(generation(context_tokens=64), tmp_path / "store", model=source), "options": {"target": "tensorrt", "nice": 0}}
    )
    assert (verdict["passed"], verdict["precision"]) == (True, "fp16")
    assert 0 < verdict["figures"]["mean_kl"] < 0.01


@pytest.mark.slow
def test_a_fault_in_the_plan_of_a_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(tmp_path / "site", monkeypatch, "8.5.2.2", weight="blk.1.ffn_norm", by=1.5)
    source = write_decoder(tmp_path / "tiny.gguf", Recipe())
    verdict = built(
        {**request(generation(context_tokens=64), tmp_path / "store", model=source), "options": {"target": "tensorrt", "nice": 0}}
    )
    first, second = verdict["attempts"]
    assert (first["status"], second["precision"], second["status"]) == ("failed", "fp32", "passed")
    assert "blk.1" in first["worst"]["name"] + first["worst"]["last_good"], first


def test_what_runs_on_the_accelerator_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(tmp_path / "site", monkeypatch, "10.3.0")
    verdict = built(asked(tmp_path / "store", dla_core=0, optimization_level=5))
    notes = verdict["attempts"][0]["notes"]
    assert 0 < notes["dla_layers"] < notes["dla_candidates"] < notes["layers"]
    (view,) = ladder_of(verdict)
    assert f"{notes['dla_layers']} of {notes['layers']} layers on the DLA (" in view.notes
    assert " nodes in half precision (" in view.notes
    with pytest.raises(ConversionError, match="sees 2 DLA cores"):
        built(asked(tmp_path / "store", dla_core=2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_ended_leaves_nothing_and_nobody(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `python -m converters build`, in the middle of TensorRT's own work."""
    fake_device.install(tmp_path / "site", monkeypatch, "10.3.0", step_s=2.0)
    child = subprocess.Popen(
        [sys.executable, "-m", "converters", "build"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    with child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(asked(tmp_path / "store")).encode())
        child.stdin.close()
        for line in child.stdout:
            if "Optimizing the graph" in json.loads(line).get("message", ""):
                break
        family = descendants(child.pid)
        assert len(family) == 2, "the builder and TensorRT's process"
        os.kill(child.pid, number)
        assert child.wait(30) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    until = time.monotonic() + 30
    while any(Path(f"/proc/{each}").exists() for each in family):
        assert time.monotonic() < until, "a process of the build lives on"
        time.sleep(0.02)
    store = open_store(tmp_path / "store")  # sweeps
    assert store.engines() == [] and not list((tmp_path / "store" / "temporary").iterdir())


def descendants(pid: int) -> list[int]:
    children = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [each for child in children for each in (child, *descendants(child))]
