"""Tests that need an NVIDIA GPU with its driver: `make test-gpu`. Without one they are skipped, with the driver's own reason.

Whether TensorRT runs on this GPU at all is asked of a child process, for it may crash instead of answering.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.device import Device, probe_device
from models.engines import EngineError
from models.engines.device_memory import BACK_ENDS, DeviceMemory, open_device_memory
from models.engines.tensorrt_plan import MODULES

ROOT = Path(__file__).parent.parent.parent
BUILD_S = 900.0

RUN = """
import sys
from pathlib import Path
import numpy as np
from models.engines import open_engine
engine = open_engine(Path(sys.argv[1]))
spec = engine.inputs[0]
engine.run({spec.name: np.zeros([abs(size) for size in spec.shape], spec.dtype)})
engine.close()
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(BUILD_S))


@pytest.fixture(scope="session", autouse=True)
def gpu() -> Device:
    device = probe_device()
    if device.kind != "cuda":
        pytest.skip(f"no GPU: {device.reason}")
    return device


def build(module: str, onnx: Path, folder: Path, profiles: list[dict[str, Any]], precision: str = "fp32") -> Path:
    """`folder`/model.plan, built in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    request = {
        "module": module, "onnx": str(onnx), "plan": str(folder / "model.plan"), "profiles": profiles,
        "precision": "typed" if precision == "fp16" else precision, "workspace_bytes": 1 << 30, "timing_cache": None,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "converters.tensorrt_from_onnx"],
        input=json.dumps(request), capture_output=True, text=True, timeout=BUILD_S, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return folder


@pytest.fixture(scope="session")
def tensorrt(gpu: Device, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The TensorRT that is here and runs on this GPU: the module's name."""
    reasons = []
    for module in MODULES:
        if importlib.util.find_spec(module) is None:
            reasons.append(f"{module} is not installed")
            continue
        onnx = ROOT / "models/weights/conveyor_detr.onnx"
        shape = [[1, 3, 192, 320]] * 3
        folder = build(module, onnx, tmp_path_factory.mktemp(module), [{"pixel_values": shape}])
        done = subprocess.run([sys.executable, "-c", RUN, str(folder)], capture_output=True, text=True, timeout=BUILD_S, cwd=ROOT)
        if done.returncode == 0:
            return module
        reasons.append(f"{module} does not run on {gpu.name}: {done.stderr.strip().splitlines()[-1:]}")
    pytest.skip("; ".join(reasons))


@pytest.fixture(params=[*BACK_ENDS, "cuda-python mapped"])
def memory(request: pytest.FixtureRequest) -> Iterator[DeviceMemory]:
    """Each package, and host memory that is read in place, which a discrete GPU can do as well."""
    try:
        opened = open_device_memory(request.param.split()[0])
    except EngineError as error:
        pytest.skip(str(error))
    if "mapped" in request.param:
        opened.is_mapped = True
    yield opened
    opened.close()
