"""Builds that cannot be: each ends with one line that says why and what to do, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.converters.tensorrt.graphs import asymmetric, convolutions, encoder, unknown_operator
from tests.converters.tensorrt.process import MODULE, build, building, request

pytest.importorskip("tensorrt_rtx")

BELT = ROOT / "models" / "weights" / "conveyor_detr.onnx"
SHAPE = [1, 3, 192, 320]
PROFILES = [{"pixel_values": [SHAPE, SHAPE, SHAPE]}]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    folder = tmp_path / "engine"
    folder.mkdir()
    return folder / "model.plan"


def left(plan: Path) -> list[str]:
    return sorted(file.name for file in plan.parent.iterdir())


def test_an_unknown_operator_is_named_with_its_node(tmp_path: Path, plan: Path) -> None:
    ended = build(request(unknown_operator(tmp_path / "a.onnx"), plan))
    error = ended.error
    assert (ended.status, error["code"], error["node"], error["operator"]) == (1, "unsupported_operator", "strange", "Frobnicate")
    assert "another opset" in error["message"] and "strange (Frobnicate)" in error["message"]
    assert left(plan) == []


def test_quantisation_that_tensorrt_cannot_parse_says_how_to_quantise(tmp_path: Path, plan: Path) -> None:
    error = build(request(asymmetric(tmp_path / "a.onnx"), plan, precision="typed")).error
    assert error["code"] == "unsupported_operator" and "signed and symmetric" in error["message"]
    assert "bias_dequantise" in error["node"] + error["message"]


def test_a_missing_profile_names_the_inputs(tmp_path: Path, plan: Path) -> None:
    source = encoder(tmp_path / "encoder.onnx")
    none = build(request(source, plan)).error
    assert none["code"] == "no_profile"
    assert "input_ids [-1, -1], attention_mask [-1, -1]" in none["message"] and "`profiles`" in none["message"]
    half = build(request(source, plan, profiles=[{"input_ids": [[1, 1], [1, 8], [1, 16]]}])).error
    assert half["code"] == "no_profile" and "attention_mask" in half["message"] and "input_ids [" not in half["message"]
    assert left(plan) == []


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ({"pixels": [SHAPE, SHAPE, SHAPE]}, "profiles name pixels; the inputs are pixel_values [-1, 3, 192, 320]"),
        ({"pixel_values": [[1, 3, 192], [1, 3, 192], [1, 3, 192]]}, "does not fit the graph"),
        ({"pixel_values": [[1, 3, 64, 320], [1, 3, 192, 320], [1, 3, 192, 320]]}, "does not fit the graph"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(plan: Path, profile: dict[str, Any], words: str) -> None:
    error = build(request(BELT, plan, profiles=[profile])).error
    assert error["code"] == "no_profile" and words in error["message"]


def test_too_little_workspace_is_a_lack_of_memory(plan: Path) -> None:
    ended = build(request(BELT, plan, profiles=PROFILES, workspace_bytes=1))
    assert (ended.status, ended.error["code"]) == (1, "no_memory")
    assert "larger workspace_bytes" in ended.error["message"]
    assert left(plan) == []


def test_more_workspace_than_memory_is_told(tmp_path: Path, plan: Path) -> None:
    ended = build(request(convolutions(tmp_path / "a.onnx"), plan, workspace_bytes=1 << 43))
    assert any("of memory are free" in line["message"] for line in ended.progress)
    assert ended.result


def test_garbage_is_no_onnx(tmp_path: Path, plan: Path) -> None:
    source = tmp_path / "a.onnx"
    for content in (b"", b"\x08\x99garbage" * 50, BELT.read_bytes()[:100_000]):
        source.write_bytes(content)
        ended = build(request(source, plan))
        assert (ended.status, ended.error["code"]) == (1, "parse"), ended.lines[-1]
        assert left(plan) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"onnx": "/nowhere/a.onnx"}, "/nowhere/a.onnx is no file"),
        ({"plan": "/nowhere/model.plan"}, "/nowhere is no folder"),
        ({"plan": "relative.plan"}, "absolute path"),
        ({"module": "os"}, "must be one of tensorrt, tensorrt_rtx"),
        ({"precision": "fp8"}, "must be one of"),
        ({"precision": ["fp16"]}, "must be one of"),
        ({"workspace_bytes": 0}, "integer from 1"),
        ({"workspace_bytes": True}, "integer from 1"),
        ({"dla_core": 9}, "integer from -1 to 3"),
        ({"optimization_level": 9}, "integer from 0 to 5"),
        ({"version_compatible": 1}, "true or false"),
        ({"fp32_layers": "norm"}, "list of patterns"),
        ({"profiles": {}}, "list of at most"),
        ({"profiles": [{"x": [[1], [2]]}]}, "ascending"),
        ({"profiles": [{"x": [[2], [1], [3]]}]}, "ascending"),
        ({"profiles": [{"x": [[1], [1, 2], [3]]}]}, "equally long"),
        ({"surprise": 1}, "must be an object with"),
    ],
)
def test_a_bad_request_is_refused(plan: Path, change: dict[str, Any], words: str) -> None:
    error = build({**request(BELT, plan), **change}).error
    assert error["code"] == "bad_request" and words in error["message"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b"[" * 100_000, b" " * (2 << 20)], ids=lambda text: str(text[:4]))
def test_a_request_that_is_none_is_refused(text: bytes) -> None:
    ended = build(text)
    assert (ended.status, ended.error["code"]) == (1, "bad_request")


def test_arguments_are_wrong_use() -> None:
    done = subprocess.run([sys.executable, "-m", MODULE, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "usage:" in done.stderr and done.stdout == ""


def test_an_interpreter_without_tensorrt_says_so(plan: Path) -> None:
    error = build({**request(BELT, plan), "module": "tensorrt"}).error
    assert error["code"] == "unsupported" and "cannot import tensorrt" in error["message"] and "worker.python" in error["message"]


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_plan_that_does_not_fit_on_the_disk_is_not_there(plan: Path) -> None:
    plan.write_bytes(b"old")
    ended = build(request(BELT, plan, profiles=PROFILES), before=small_files)
    assert (ended.status, ended.error["code"]) == (1, "no_space")
    assert os.strerror(errno.EFBIG) in ended.error["message"]
    assert left(plan) == ["model.plan"] and plan.read_bytes() == b"old"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)], capture_output=True).returncode != 0:
        pytest.skip("no right to mount")
    try:
        ended = build(request(BELT, disk / "model.plan", profiles=PROFILES))
        assert (ended.status, ended.error["code"]) == (1, "no_space")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_build_ends_within_a_second(plan: Path, number: signal.Signals) -> None:
    with building(request(BELT, plan, profiles=PROFILES)) as process:
        sent = time.monotonic()
        process.send_signal(number)
        status = process.wait(10)
        took_s = time.monotonic() - sent
        assert process.stdout is not None
        last = json.loads(process.stdout.read().splitlines()[-1])
    assert status == 143
    assert last["error"]["code"] == "cancelled"
    assert took_s < 1.0
    assert left(plan) == []


def test_a_killed_build_leaves_no_half_plan(plan: Path) -> None:
    with building(request(BELT, plan, profiles=PROFILES)) as process:
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
    assert left(plan) == []


def test_a_build_that_nobody_reads_ends(plan: Path) -> None:
    with building(request(BELT, plan, profiles=PROFILES)) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(30) != 0
    assert left(plan) == []
