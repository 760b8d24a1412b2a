"""Our code against the real bindings of the TensorRT versions of JetPack 5, 6 and 7."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.bindings import Bindings, NotAvailable, all_bindings, provide
from tests.conformance.uses import Use, asked, sources, uses
from tests.conftest import ROOT

RUN_S = 30
# EXPLICIT_BATCH in 8, later STRONGLY_TYPED, whose number changed with 11.
BITS = {"8": 1, "10": 2, "11": 1}
NO_FLAGS = frozenset({"BuilderFlag.FP16", "BuilderFlag.INT8", "BuilderFlag.OBEY_PRECISION_CONSTRAINTS"})
NO_WEAK_TYPES = NO_FLAGS | {"ILayer.precision", "ILayer.set_output_type", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"}

# What we use and a version lacks: all of it stands behind a question to the module (`Capabilities`, hasattr).
LACKS: dict[str, frozenset[str]] = {
    "8.5.2.2": frozenset(
        {
            "BuilderFlag.VERSION_COMPATIBLE",
            "HardwareCompatibilityLevel.AMPERE_PLUS",
            "IBuilderConfig.builder_optimization_level",
            "IBuilderConfig.hardware_compatibility_level",
            "IBuilderConfig.progress_monitor",
            "IProgressMonitor",
            "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
            "OnnxParser.set_flag",
            "OnnxParserFlag.NATIVE_INSTANCENORM",
            "ParserError.node_name",
            "ParserError.node_operator",
        }
    ),
    "10.3.0": frozenset(),
    "10.16.1.11": frozenset(),
    "11.4.0.106": NO_WEAK_TYPES,
    "rtx": NO_WEAK_TYPES,
}


def provided(bindings: Bindings) -> Bindings:
    try:
        provide(bindings)
    except NotAvailable as error:
        if os.environ.get("HOTSPARE_REQUIRE_TEST_DATA") and bindings.distribution != "tensorrt":
            pytest.fail(str(error))
        pytest.skip(str(error))
    return bindings


@pytest.fixture(params=all_bindings(), ids=lambda bindings: bindings.version, scope="module")
def bindings(request: pytest.FixtureRequest) -> Bindings:
    return provided(request.param)


def run(program: str, question: dict[str, Any], python: str, environment: dict[str, str]) -> Any:
    done = subprocess.run(
        [python, "-m", f"tests.conformance.{program}"],
        cwd=ROOT,
        env=environment,
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def all_uses() -> list[Use]:
    return [use for file in sources() for use in uses(file)]


def test_the_uses_are_found() -> None:
    """The reading of our own source: a slip there would let everything pass."""
    found = {use.path: use.arguments for use in all_uses()}
    assert found["IBuilderConfig.set_memory_pool_limit"] == 2
    assert found["BuilderFlag.OBEY_PRECISION_CONSTRAINTS"] == -1
    assert found["IExecutionContext.execute_async_v3"] == 1
    assert found["ICudaEngine.get_tensor_profile_shape"] == 2
    assert len(found) > 60


def check(answer: dict[str, Any], lacks: frozenset[str]) -> None:
    absent = set(answer["absent"])
    places = sorted(f"{use.path} ({use.file}:{use.line})" for use in all_uses() if use.path in absent - lacks)
    assert not places, f"TensorRT {answer['version']} has no {', '.join(places)}: ask the module first, then add it to LACKS"
    assert lacks <= absent, f"TensorRT {answer['version']} has {lacks - absent}, or we no longer use it: take it out of LACKS"
    for use in all_uses():
        least, most = answer["arguments"].get(use.path, (0, 99))
        fits = use.arguments < 0 or least <= use.arguments <= most
        assert fits, (
            f"{use.file}:{use.line}: {use.path} takes {least} to {most} arguments in TensorRT {answer['version']}, not {use.arguments}"
        )


def test_what_we_use_is_there(bindings: Bindings) -> None:
    question = {"module": "tensorrt", "paths": sorted({use.path for use in all_uses()})}
    answer = run("answers", question, bindings.python, bindings.environment())
    assert answer["version"] == bindings.version
    assert len(answer["arguments"]) > 20, "the signatures could not be read"
    check(answer, LACKS[bindings.version])


def test_what_stands_in_for_a_gpu_is_here() -> None:
    """Tests skip where TensorRT-RTX is not installed; where everything is required, that would pass unseen."""
    if not os.environ.get("HOTSPARE_REQUIRE_TEST_DATA"):
        pytest.skip("not required here: HOTSPARE_REQUIRE_TEST_DATA is not set")
    importlib.import_module("tensorrt_rtx")


def test_what_we_use_is_in_rtx() -> None:
    pytest.importorskip("tensorrt_rtx")
    question = {"module": "tensorrt_rtx", "paths": sorted({use.path for use in all_uses()})}
    check(run("answers", question, sys.executable, dict(os.environ)), LACKS["rtx"])


def test_what_we_ask_for_is_somewhere(bindings: Bindings) -> None:
    """A question to the module about a name that no version has would always be answered with no."""
    question = {"module": "tensorrt", "paths": sorted({use.path for use in asked()})}
    answer = run("answers", question, bindings.python, bindings.environment())
    if bindings.version.startswith("10."):  # they have both the old and the new
        assert answer["absent"] == []


@pytest.fixture
def rehearse(bindings: Bindings, tmp_path: Path) -> Any:
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(b"any")
    base = {"module": "tensorrt", "onnx": str(onnx), "plan": str(tmp_path / "model.plan"), "profiles": [{"x": [[1, 3], [2, 3], [4, 3]]}]}

    def play(*changes: dict[str, Any], fails: bool = False) -> list[Any]:
        environment = {**bindings.environment(), "REHEARSAL_FAILS": "yes" if fails else ""}
        return list(
            run("rehearsal", {"module": "tensorrt", "requests": [{**base, **change} for change in changes]}, bindings.python, environment)
        )

    return play


def is_eight(bindings: Bindings) -> bool:
    return bindings.version.startswith("8.")


def has_flags(bindings: Bindings) -> bool:
    return not bindings.version.startswith("11.")


def test_without_cuda_the_builder_fails_with_a_type_error(bindings: Bindings, tmp_path: Path) -> None:
    """Behind a driver that answers, on the real process: TensorRT's word for a null pointer becomes a clear one."""
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(b"any")
    request = {"module": "tensorrt", "onnx": str(onnx), "plan": str(tmp_path / "model.plan")}
    done = subprocess.run(
        [bindings.python, "-m", "converters.tensorrt_from_onnx"],
        cwd=ROOT,
        env=bindings.environment(),
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert (done.returncode, error["code"]) == (1, "no_device")
    assert f"TensorRT {bindings.version} cannot start here" in error["message"]


def test_full_precision_turns_tf32_off(bindings: Bindings, rehearse: Any) -> None:
    made, exact, fast = rehearse({"precision": "fp32"}, {"precision": "tf32"})
    assert "factory function returned nullptr" in made["builder"]
    assert exact["seen"]["cleared"] == ["TF32"] and "flags" not in exact["seen"]
    assert fast["seen"]["flags"] == ["TF32"] and "cleared" not in fast["seen"]
    assert exact["result"]["size_bytes"] == 4 and exact["result"]["layers"] == 6
    assert exact["seen"]["network_flags"] == BITS[bindings.version.split(".")[0]]
    assert exact["seen"]["profile"] == ["x", [[1, 3], [2, 3], [4, 3]]]
    assert exact["seen"]["pool"] == ["WORKSPACE", 1 << 30]
    assert exact["seen"].get("goes_on") is (None if is_eight(bindings) else True)


def test_types_of_the_graph_need_a_typed_network(bindings: Bindings, rehearse: Any) -> None:
    _, typed = rehearse({"precision": "typed"})
    if is_eight(bindings):
        assert typed["error"]["code"] == "unsupported" and "TensorRT 8.5.2.2 has no strongly typed networks" in typed["error"]["message"]
    else:
        assert typed["seen"]["network_flags"] == BITS[bindings.version.split(".")[0]] and "flags" not in typed["seen"]


def test_flags_keep_named_layers_in_fp32(bindings: Bindings, rehearse: Any) -> None:
    _, half, eight = rehearse({"precision": "fp16", "fp32_layers": ["norm*"]}, {"precision": "int8"})
    if not has_flags(bindings):
        assert half["error"]["code"] == eight["error"]["code"] == "unsupported"
        return
    assert half["seen"]["network_flags"] == int(is_eight(bindings))
    assert half["seen"]["flags"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    # Not the layer that moves data, not the one that makes integers.
    assert half["seen"]["pinned"] == ["norm", "norm_1"]
    assert [name for name, kind in half["seen"]["outputs"] if kind == "DataType.FLOAT"] == ["norm", "norm_1"]
    assert half["result"]["fp32_layers"] == 2
    assert eight["seen"]["flags"] == ["FP16", "INT8"] and "pinned" not in eight["seen"]


def test_the_accelerator_gets_what_it_can_run(rehearse: Any) -> None:
    _, used, beyond = rehearse({"dla_core": 1}, {"dla_core": 2})
    assert used["seen"]["IBuilderConfig"]["default_device_type"].endswith("DLA")
    assert used["seen"]["IBuilderConfig"]["DLA_core"] == "1" and "GPU_FALLBACK" in used["seen"]["flags"]
    assert used["seen"]["IBuilderConfig"]["profiling_verbosity"].endswith("DETAILED")
    assert (used["result"]["dla_candidates"], used["result"]["dla_layers"]) == (1, 1)
    assert any("1 of 6 layers can run on DLA core 1" in line for line in used["lines"])
    assert beyond["error"]["code"] == "unsupported" and "sees 2 DLA cores" in beyond["error"]["message"]


def test_compatibility_and_level_where_they_exist(bindings: Bindings, rehearse: Any) -> None:
    _, version, hardware, level = rehearse({"version_compatible": True}, {"hardware_compatible": True}, {"optimization_level": 5})
    if is_eight(bindings):
        assert {version["error"]["code"], hardware["error"]["code"]} == {"unsupported"}
        assert "TensorRT 8.5.2.2 has no version-compatible plans" in version["error"]["message"]
        assert "result" in level
    else:
        assert version["seen"]["flags"] == ["VERSION_COMPATIBLE"] and version["seen"]["parser_flags"] == ["NATIVE_INSTANCENORM"]
        assert hardware["seen"]["IBuilderConfig"]["hardware_compatibility_level"].endswith("AMPERE_PLUS")
        assert level["seen"]["IBuilderConfig"]["builder_optimization_level"] == "5"


def test_the_timing_cache_is_read_combined_and_kept(bindings: Bindings, rehearse: Any, tmp_path: Path) -> None:
    file = tmp_path / "timing.cache"
    _, first, second = rehearse({"timing_cache": str(file)}, {"timing_cache": str(file)})
    assert (first["seen"]["timing_cache"], second["seen"]["timing_cache"]) == ("", "+timed")
    assert second["seen"]["combined"] == "+timed"
    assert file.read_bytes().endswith(b"+timed+timed") and bindings.version.encode() in file.read_bytes()
    file.write_bytes(file.read_bytes()[:-1])
    _, damaged = rehearse({"timing_cache": str(file)})
    assert damaged["seen"]["timing_cache"] == "" and "result" in damaged
    assert file.read_bytes().endswith(b"\n+timed")


def test_a_build_of_nothing_is_explained_by_the_log(rehearse: Any, tmp_path: Path) -> None:
    _, outcome = rehearse({}, fails=True)
    error = outcome["error"]
    assert (error["code"], error["node"]) == ("no_kernel", "norm")
    assert "Could not find any implementation for node norm" in error["message"] and "stop pipelines" in error["message"]
    assert not (tmp_path / "model.plan").exists()
