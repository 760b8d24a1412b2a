from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType
from typing import Any

import onnxruntime
import pytest

from models.device import Device
from models.record import RecordError, to_mapping
from models.runtimes import OnnxRuntime, Runtimes, TensorRT, find_runtimes, parse_runtimes

CPU = Device("cpu", "cpu")


def module(name: str, version: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(__version__=version, **attributes)
    return made


def test_the_answer_of_a_process_is_parsed() -> None:
    done = subprocess.run([sys.executable, "-m", "models.runtimes"], capture_output=True, timeout=60, check=True)
    assert done.stdout.count(b"\n") == 1
    found = parse_runtimes(done.stdout)
    assert found.onnxruntime == OnnxRuntime(onnxruntime.__version__, tuple(onnxruntime.get_available_providers()))
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert found.problems == {}


def test_what_is_missing_is_none_and_what_is_broken_is_told() -> None:
    def load(name: str) -> ModuleType:
        if name == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "tensorrt":
            raise ImportError("libcublas.so.11: cannot open shared object file")
        return module(name, "1.7.1.116")

    found = find_runtimes(load, lambda: CPU)
    assert (found.onnxruntime, found.tensorrt, found.tensorrt_rtx) == (None, None, TensorRT("1.7.1.116"))
    assert found.problems == {"tensorrt": "ImportError: libcublas.so.11: cannot open shared object file"}
    assert parse_runtimes(json.dumps(to_mapping(found)).encode()) == found


def test_a_module_that_misses_another_is_broken_not_absent() -> None:
    def load(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    assert set(find_runtimes(load, lambda: CPU).problems) == {"onnxruntime", "tensorrt", "tensorrt_rtx"}


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (b"", "no JSON"),
        (b"\xff", "no JSON"),
        (b'{"python": "3.8.10"}', "'device' is missing"),
        (json.dumps({**to_mapping(Runtimes("3.8.10", CPU)), "torch": {}}).encode(), "unknown field 'torch'"),
        (b" " * (2 << 20), "2097152 bytes"),
    ],
)
def test_another_answer_is_refused(output: bytes, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        parse_runtimes(output)
