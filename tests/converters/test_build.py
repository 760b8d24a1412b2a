"""Builds as the child process that they always are."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from models.catalog import load_catalog
from models.device import probe_device
from models.engine_record import read_engine
from models.engines import EngineOptions, SlotTokens, open_generation_engine
from models.record import to_mapping
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


@pytest.mark.parametrize("form", ["onnx", "transformers"])
def test_a_source_that_cannot_be_used_ends_the_ladder_at_once(tmp_path: Path, form: str) -> None:
    """Neither a broken file nor a model that cannot be exported goes better at another precision."""
    weights = "model.safetensors" if form == "transformers" else "model"
    contents = {weights: "no weights"}
    if form == "transformers":
        names = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
        contents["config.json"] = json.dumps({"model_type": "rt_detr", "architectures": ["RTDetrForObjectDetection"], **names})
    for role, content in contents.items():
        (tmp_path / role).write_text(content)
    files = {role: {"source": f"file:/nowhere/{role}"} for role in contents}
    sources = {role: tmp_path / role for role in contents}
    asked = request({**detection(), "format": form, "files": files}, tmp_path / "store", **sources)
    status, lines = run({**asked, "options": {"precision": "int8"}})
    # Without torch and transformers nothing is exported, with them the weights are seen to be none.
    assert (status, lines[-1]["error"]["code"] in ("bad_file", "unsupported")) == (1, True), lines[-1]
    told = [line["message"] for line in lines[:-1]]
    assert any(message.startswith("int8: ") for message in told) and not any(message.startswith("fp32: ") for message in told)


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


@pytest.mark.parametrize(
    ("number", "phase"),
    [
        *((signal.SIGKILL, phase) for phase in ("read", "convert", "verify", "publish")),
        *((signal.SIGTERM, phase) for phase in ("convert", "publish")),
        *(pytest.param(signal.SIGTERM, phase, marks=pytest.mark.slow) for phase in ("read", "verify")),
    ],
)
def test_an_ended_build_leaves_no_half_result(tmp_path: Path, tiny: dict[str, Any], number: signal.Signals, phase: str) -> None:
    with started(tiny) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if json.loads(line)["phase"] == phase:
                os.kill(child.pid, number)
                break
        child.stdout.read()
        status = child.wait(timeout=30)
    store = tmp_path / "store"
    # In its last moment a build may be whole before the signal comes.
    whole = [] if phase != "publish" else open_store(store).engines()
    if number == signal.SIGTERM:
        assert status == 143 or (whole and status == 0)
        assert not list((store / "temporary").iterdir())
    else:
        assert status == -signal.SIGKILL
    # The builder dies with who watches it; then the next to open the store sweeps.
    deadline = time.monotonic() + 10
    while list((open_store(store).root / "temporary").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [engine.record.key for engine in open_store(store).engines()] == [engine.record.key for engine in whole]
    status, lines = run(tiny)
    assert (status, lines[-1]["result"]["is_reused"]) == (0, bool(whole))
    (folder,) = (store / "engines" / "tiny-generation").iterdir()
    assert read_engine(folder) is not None


def test_a_build_that_takes_too_long_is_ended(tmp_path: Path, tiny: dict[str, Any]) -> None:
    # Another holds the lock of this engine, so the build waits.
    from converters.build import KINDS, engine_key
    from converters.ladder import Place, Step
    from converters.request import parse_request

    asked = parse_request(json.dumps(tiny).encode())
    store = open_store(tmp_path / "store")
    place = Place("onnxruntime", onnxruntime.__version__)
    key = engine_key(asked, store, KINDS["gguf", "generation"], place, Step("fp32"))
    with store.lock(f"build-{key.digest()}", 1.0):
        status, lines = run({**tiny, "options": {"timeout_s": 2}})
    assert (status, lines[-1]["error"]["code"]) == (1, "timeout")


def test_a_build_that_is_killed_says_so_and_leaves_nothing(tmp_path: Path, tiny: dict[str, Any]) -> None:
    with started(tiny) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if json.loads(line)["phase"] == "convert":
                (builder,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
                os.kill(int(builder), signal.SIGKILL)
                break
        last = json.loads(child.stdout.read().splitlines()[-1])
        assert child.wait(timeout=30) == 1
    assert last["error"]["code"] == "died"
    assert not list((tmp_path / "store" / "temporary").iterdir())


def test_a_stopped_process_does_not_delay_the_end(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Like a runtime deep in C++: the builder handles no signal."""
    with started(tiny) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if json.loads(line)["phase"] == "convert":
                (builder,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
                os.kill(int(builder), signal.SIGSTOP)
                break
        begin = time.monotonic()
        child.terminate()
        assert child.wait(timeout=30) == 143
        assert time.monotonic() - begin < 1.0
    assert not list((tmp_path / "store" / "temporary").iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, tiny: dict[str, Any]) -> None:
    # A limit on the size of files fails writes like a full disk does, and needs no disk.
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(COMMAND, input=json.dumps(tiny).encode(), capture_output=True, cwd=ROOT, timeout=60, preexec_fn=limit)
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["error"]["code"] == "no_space"
    assert open_store(tmp_path / "store").engines() == []
    assert not list((tmp_path / "store" / "temporary").iterdir())


def started(value: Any) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
    assert child.stdin is not None
    child.stdin.write(json.dumps(value).encode())
    child.stdin.close()
    return child


CONVEYOR = ROOT / "models" / "weights" / "conveyor_detr.onnx"


def test_a_plan_is_not_published_where_nothing_can_prove_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    if probe_device().kind == "cuda":
        pytest.skip("a device is here")
    asked = request(to_mapping(load_catalog().find("conveyor-detr")), tmp_path / "store", model=CONVEYOR)
    asked["options"] = {"target": "tensorrt_rtx"}
    status, lines = run(asked)
    assert (status, lines[-1]["error"]["code"]) == (1, "not_verified")
    asked["options"]["accept_unverified"] = True
    status, lines = run(asked)
    assert status == 0, lines[-1]
    verdict = lines[-1]["result"]["verdict"]
    assert (verdict["passed"], verdict["status"], verdict["precision"]) == (False, "not run", "fp16")
    engine = read_engine(Path(lines[-1]["result"]["folder"]))
    assert engine is not None
    assert set(engine.record.files) == {"model.plan"}
    assert (engine.record.key.runtime, engine.record.key.device) == ("tensorrt_rtx", "cpu")
    # Without the operator's word the one in the store does not count either.
    asked["options"]["accept_unverified"] = False
    assert run(asked)[1][-1]["error"]["code"] == "not_verified"


def test_a_build_of_tensorrt_is_cancelled_within_a_second(tmp_path: Path) -> None:
    """In the middle of the real builder's work, through the process that a node watches."""
    pytest.importorskip("tensorrt_rtx")
    asked = request(to_mapping(load_catalog().find("conveyor-detr")), tmp_path / "store", model=CONVEYOR)
    asked["options"] = {"target": "tensorrt_rtx", "accept_unverified": True, "nice": 0}
    took = []
    for _ in range(3):  # a busy machine may take any single one longer
        with started(asked) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if "build: " in json.loads(line).get("message", "") and json.loads(line)["phase"] == "convert":
                    break
            begin = time.monotonic()
            child.terminate()
            assert child.wait(timeout=30) == 143
            took.append(time.monotonic() - begin)
        store = open_store(tmp_path / "store")
        assert store.engines() == [] and not list((tmp_path / "store" / "temporary").iterdir())
        if took[-1] < 1.0:
            return
    pytest.fail(f"cancelling took {took} s")
