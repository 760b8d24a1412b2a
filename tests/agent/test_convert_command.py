"""`hotspare convert` as it is typed, on real models, and what the node finds afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models.store import open_store
from tests.conftest import ROOT
from tests.converters.tiny_gguf import Recipe, write_decoder
from tests.converters.tiny_onnx import detector, save

Convert = Callable[..., subprocess.CompletedProcess[str]]


def environment(state: Path, **values: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("HOTSPARE_")}
    return {**own, "HOTSPARE_STATE": str(state), "HOTSPARE_SITE": str(state / "site"), "COLUMNS": "400", **values}


@pytest.fixture
def hotspare(tmp_path: Path) -> Convert:
    def call(*words: str, **values: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "agent.cli", *words]
        return subprocess.run(command, env=environment(tmp_path / "state", **values), cwd=ROOT, text=True, capture_output=True, timeout=100)

    return call


def test_a_model_of_the_catalogue(hotspare: Convert, tmp_path: Path) -> None:
    done = hotspare("convert", "conveyor-detr")
    assert done.returncode == 0, done.stderr
    assert "conveyor-detr: the same model" in done.stdout
    assert "matched_boxes" in done.stdout and "0.95" in done.stdout
    (engine,) = open_store(tmp_path / "state").engines("conveyor-detr")
    assert str(engine.folder) in done.stdout
    again = hotspare("convert", "conveyor-detr", "--json")
    assert json.loads(again.stdout)["verdict"]["passed"] is True
    assert hotspare("convert", "conveyor-detr", "detection.height=4").returncode == 1


def test_a_real_detector_by_its_path_shows_its_ladder(hotspare: Convert, test_data: Path, tmp_path: Path) -> None:
    path = str(test_data / "models/deimv2_hgnetv2_atto_coco_raw.onnx")
    done = hotspare("convert", path, "--name", "atto", "--precision", "int8")
    assert done.returncode == 0, done.stderr
    assert "matched_boxes is" in done.stdout and "relative error" in done.stdout, "the refused attempt and its worst tensor"
    (engine,) = open_store(tmp_path / "state").engines("atto")
    assert [attempt["status"] for attempt in engine.record.verdict["attempts"]] == ["failed", "passed"]
    listed = {model["name"]: model for model in json.loads(hotspare("models", "list", "--json").stdout)}
    assert (listed["atto"]["files_here"], listed["atto"]["engines"]) == (1, 1)
    assert hotspare("models", "rm", "atto", "--forget").returncode == 0
    assert "atto" not in {model["name"] for model in json.loads(hotspare("models", "list", "--json").stdout)}


def test_a_gguf_by_its_path_can_be_converted_by_its_name_afterwards(hotspare: Convert, tmp_path: Path) -> None:
    path = write_decoder(tmp_path / "tiny.gguf", Recipe())
    done = hotspare("convert", str(path), "--target", "onnxruntime")
    assert done.returncode == 0, done.stderr
    assert "tiny: the same model" in done.stdout and "greedy_agreement" in done.stdout
    path.unlink()
    again = hotspare("convert", "tiny", "--target", "onnxruntime", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["key"]["runtime"] == "onnxruntime"


def test_what_fails_leaves_neither_a_manifest_nor_copies(hotspare: Convert, tmp_path: Path) -> None:
    path = save(tmp_path / "eyes.onnx", detector())
    failed = hotspare("convert", str(path), "--target", "tensorrt")
    assert (failed.returncode, failed.stderr.count("error:")) == (1, 1)
    assert "tensorrt" in failed.stderr and "Traceback" not in failed.stderr
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(write_decoder(tmp_path / "tiny.gguf", Recipe()).read_bytes()[:5000])
    assert hotspare("convert", str(cut)).returncode == 1
    state = tmp_path / "state"
    assert not (state / "manifests").exists()
    assert list((state / "blobs/sha256").iterdir()) == []


@pytest.mark.parametrize("model", ["nobody", "./nothing.onnx", "hf:nonsense", "./"])
def test_what_is_no_model_is_one_line(hotspare: Convert, model: str) -> None:
    done = hotspare("convert", model)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_a_name_that_is_taken_is_not_taken_again_by_accident(hotspare: Convert, tmp_path: Path) -> None:
    done = hotspare("convert", str(save(tmp_path / "conveyor-detr.onnx", detector())))
    assert done.returncode == 1 and "--name" in done.stderr


def lines_of(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    assert process.stderr is not None
    while chunk := os.read(process.stderr.fileno(), 4096):
        yield chunk


def children_of(process: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            child = int(stat.parent.name)
            found += [child, *children_of(child)]
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_cancelled_conversion_ends_within_a_second_and_leaves_nothing(test_data: Path, tmp_path: Path, number: signal.Signals) -> None:
    state = tmp_path / "state"
    path = str(test_data / "models/deimv2_hgnetv2_femto_coco_raw.onnx")
    command = [sys.executable, "-m", "agent.cli", "convert", path, "--name", "femto", "--precision", "fp16"]
    # A terminal, as far as rich can tell: so it writes its bar while it goes on.
    shown = environment(state, FORCE_COLOR="1", TTY_COMPATIBLE="1")
    with subprocess.Popen(command, env=shown, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        seen = b""
        for chunk in lines_of(process):
            seen += chunk
            if b"convert" in seen or b"verify" in seen:
                break
        children = children_of(process.pid)
        began_s = time.monotonic()
        process.send_signal(number)
        said = b"".join(lines_of(process))
        status = process.wait(10)
        took_s = time.monotonic() - began_s
    assert children, "a build goes on in a process of its own"
    assert (status, b"cancelled; nothing was published" in said) == (130, True), said
    assert took_s < 1.5, "a second, and the end of an interpreter"
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    left: dict[str, Any] = {name: list((state / name).iterdir()) for name in ("engines", "temporary", "partial", "blobs/sha256")}
    assert left == {"engines": [], "temporary": [], "partial": [], "blobs/sha256": []}
    assert not (state / "manifests").exists()


def test_damage_is_found_and_repaired_and_the_engine_built_again(hotspare: Convert, tmp_path: Path) -> None:
    assert hotspare("convert", "conveyor-detr").returncode == 0
    store = open_store(tmp_path / "state")
    (engine,) = store.engines("conveyor-detr")
    path = engine.path("model.onnx")
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-1] + b"\0")  # of the same length: no size tells
    found = hotspare("models", "verify")
    assert (found.returncode, found.stderr.startswith("torn: ")) == (1, True)
    repaired = hotspare("models", "verify", "--repair")
    assert (repaired.returncode, repaired.stdout.splitlines()[-1]) == (0, "what was damaged is removed")
    assert hotspare("models", "verify").returncode == 0
    assert hotspare("convert", "conveyor-detr").returncode == 0
    assert store.engines("conveyor-detr")[0].path("model.onnx").read_bytes() == content
