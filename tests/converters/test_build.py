"""Builds as the child process that they always are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.engine_record import read_engine
from models.engines import EngineOptions, SlotTokens, open_generation_engine
from models.store import open_store
from tests.conftest import ROOT
from tests.converters.manifests import detection, generation, request
from tests.converters.tiny_gguf import Recipe, write_decoder
from tests.converters.tiny_onnx import detector, save

COMMAND = [sys.executable, "-m", "converters", "build"]


def run(value: Any) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and the lines of one build."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    done = subprocess.run(COMMAND, input=text, capture_output=True, cwd=ROOT, timeout=60)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    return request(generation(), tmp_path / "store", model=write_decoder(tmp_path / "tiny.gguf", Recipe()))


def test_a_decoder_is_built_verified_published_and_reused(tmp_path: Path, tiny: dict[str, Any]) -> None:
    status, lines = run(tiny)
    assert status == 0
    result = lines[-1]["result"]
    assert not result["is_reused"]
    assert result["verdict"]["passed"]
    assert result["verdict"]["figures"]["greedy_agreement"] == 1.0
    fractions = [line["fraction"] for line in lines[:-1]]
    assert fractions == sorted(fractions)
    assert {line["phase"] for line in lines[:-1]} == {"read", "convert", "verify", "publish", "done"}
    engine = read_engine(Path(result["folder"]))
    assert engine is not None
    assert engine.record.key.precision == "fp32"
    assert set(engine.record.files) == {"model.onnx", "model.onnx.data", "tokenizer.json", "chat_template.jinja", "generation.json"}
    assert not list((tmp_path / "store" / "temporary").iterdir())
    opened = open_generation_engine(engine.folder, EngineOptions(threads=1, slots=2, context_tokens=64))
    assert np.isfinite(opened.step([SlotTokens(0, [1, 2, 3])])).all()
    opened.close()
    status, lines = run(tiny)
    assert (status, lines[-1]["result"]["is_reused"]) == (0, True)


def test_another_manifest_builds_another_engine(tiny: dict[str, Any]) -> None:
    _, first = run(tiny)
    status, second = run({**tiny, "manifest": generation(activations="int8", mean_kl=0.05)})
    assert status == 0
    assert second[-1]["result"]["key"] != first[-1]["result"]["key"]
    assert 0 < second[-1]["result"]["verdict"]["figures"]["mean_kl"] < 0.05


def test_a_result_outside_the_tolerance_is_not_published(tmp_path: Path, tiny: dict[str, Any]) -> None:
    status, lines = run({**tiny, "manifest": generation(activations="int8", mean_kl=0.0)})
    assert (status, lines[-1]["error"]["code"]) == (1, "not_the_same_model")
    assert "mean_kl" in lines[-1]["error"]["message"]
    assert open_store(tmp_path / "store").engines() == []
    assert not list((tmp_path / "store" / "temporary").iterdir())


def test_a_detector_is_built(tmp_path: Path) -> None:
    status, lines = run(request(detection(), tmp_path / "store", model=save(tmp_path / "m.onnx", detector())))
    assert status == 0
    assert lines[-1]["result"]["verdict"]["task"] == "detection"


def test_a_damaged_file_is_an_error_line(tmp_path: Path, tiny: dict[str, Any]) -> None:
    path = Path(tiny["sources"]["model"])
    path.write_bytes(path.read_bytes()[:5000])
    status, lines = run(tiny)
    assert (status, lines[-1]["error"]["code"]) == (1, "bad_file")


REQUESTS: dict[str, Any] = {
    "no JSON": b"{",
    "no object": b"[]",
    "no manifest": {"sources": {}, "store": "/tmp"},
    "unknown field": {"manifest": generation(), "sources": {"model": "/dev/null"}, "store": "/tmp", "shell": "rm"},
    "broken manifest": {"manifest": {"task": "generation"}, "sources": {}, "store": "/tmp"},
    "role without a file": {"manifest": generation(), "sources": {}, "store": "/tmp"},
    "relative path": {"manifest": generation(), "sources": {"model": "x"}, "store": "/tmp"},
    "missing file": {"manifest": generation(), "sources": {"model": "/nowhere/x"}, "store": "/tmp"},
    "unknown option": {"manifest": generation(), "sources": {"model": "/etc/hostname"}, "store": "/tmp", "options": {"x": 1}},
    "too many threads": {"manifest": generation(), "sources": {"model": "/etc/hostname"}, "store": "/tmp", "options": {"threads": 1000}},
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_bad_request_is_refused(case: str) -> None:
    from converters.errors import ConversionError
    from converters.request import parse_request

    value = REQUESTS[case]
    with pytest.raises(ConversionError) as refusal:
        parse_request(value if isinstance(value, bytes) else json.dumps(value).encode())
    assert refusal.value.code == "bad_request"


def test_a_format_without_converter_is_refused(tmp_path: Path) -> None:
    manifest = {**detection(), "format": "gguf"}
    status, lines = run(request(manifest, tmp_path / "store", model=save(tmp_path / "m.onnx", detector())))
    assert (status, lines[-1]["error"]["code"]) == (1, "unsupported")


def test_wrong_use_says_so() -> None:
    done = subprocess.run(COMMAND[:3], capture_output=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert b"usage" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_ended_build_leaves_no_half_result(tmp_path: Path, tiny: dict[str, Any], number: signal.Signals) -> None:
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(tiny).encode())
        child.stdin.close()
        for line in child.stdout:
            if json.loads(line)["phase"] == "verify":
                os.kill(child.pid, number)
                break
        child.stdout.read()
        status = child.wait(timeout=30)
    store = tmp_path / "store"
    if number == signal.SIGTERM:
        assert status == 143
        assert not list((store / "temporary").iterdir())
    else:
        assert status == -signal.SIGKILL
    assert open_store(store).engines() == []
    assert not list((store / "temporary").iterdir())
    status, lines = run(tiny)
    assert (status, lines[-1]["result"]["is_reused"]) == (0, False)
