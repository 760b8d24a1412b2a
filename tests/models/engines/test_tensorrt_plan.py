from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from models.device import Device
from models.durable import sha256_of
from models.engine_record import EngineFile, EngineKey, EngineRecord, record_bytes
from models.engines import EngineError, EngineOptions, open_engine
from tests.models.engines.fake_tensorrt import GPU, fake_module, load_plan, write_plan
from tests.models.engines.test_tensorrt import model

KEY = EngineKey("tiny", "m" * 64, {}, "plan/1", "tensorrt", "10.3.0", "Orin/sm_87", "fp16", {"l4t": "36.4.3"})
PROFILE = {"values": [[1], [1], [4]]}


def plan_bytes(folder: Path, kind: int = TensorProto.FLOAT) -> Path:
    made = model({"values": (kind, ["n"])}, [helper.make_node("Identity", ["values"], ["same"])], {"same": (kind, ["n"])})
    return write_plan(folder, made, [PROFILE])


def published(root: Path, key: EngineKey = KEY, verdict: dict[str, Any] | None = None) -> Path:
    """A folder as the store publishes it."""
    folder = plan_bytes(root / key.digest())
    files = {"model.plan": EngineFile(sha256_of(folder / "model.plan"), (folder / "model.plan").stat().st_size)}
    (folder / "engine.json").write_bytes(record_bytes(EngineRecord(key, files, verdict or {}, {}, "2026-01-01T00:00:00Z")))
    return folder


def test_a_plan_of_this_device_is_loaded(tmp_path: Path) -> None:
    plan = load_plan(published(tmp_path))
    assert [spec.name for spec in plan.inputs + plan.outputs] == ["values", "same"]
    assert plan.profiles == ({"values": ((1,), (1,), (4,))},)


@pytest.mark.parametrize(
    ("key", "device", "version", "precision", "reason"),
    [
        (
            {"runtime_version": "8.5.2.2"},
            {},
            "10.3.0",
            "auto",
            "was built for TensorRT 8.5.2.2, here it is 10.3.0; convert the model again",
        ),
        ({}, {"name": "Xavier", "sm": "72"}, "10.3.0", "auto", "was built for the device Orin/sm_87, here it is Xavier/sm_72"),
        ({}, {"l4t": "36.5.0"}, "10.3.0", "auto", "was built for L4T 36.4.3, here it is 36.5.0"),
        ({"options": {}}, {}, "10.3.0", "auto", "was built for L4T none, here it is 36.4.3"),
        ({}, {}, "10.3.0", "fp32", "was built for precision fp16, here it is fp32"),
    ],
)
def test_a_plan_of_another_device_is_refused_by_name(
    tmp_path: Path, key: dict[str, Any], device: dict[str, Any], version: str, precision: str, reason: str
) -> None:
    folder = published(tmp_path, dataclasses.replace(KEY, **key))
    here = dataclasses.replace(GPU, **device)
    with pytest.raises(EngineError, match=reason):
        load_plan(folder, EngineOptions(precision=precision), here, fake_module(version=version))


def test_the_precision_that_counts_is_where_the_ladder_ended(tmp_path: Path) -> None:
    folder = published(tmp_path, dataclasses.replace(KEY, precision="int8"), {"precision": "fp16 with attention and normalisation in fp32"})
    for precision in ("auto", "fp16"):
        load_plan(folder, EngineOptions(precision=precision))
    with pytest.raises(EngineError, match="was built for precision fp16, here it is int8"):
        load_plan(folder, EngineOptions(precision="int8"))


def test_a_plan_that_says_it_fits_other_versions_is_refused_as_well(tmp_path: Path) -> None:
    key = dataclasses.replace(KEY, options={**KEY.options, "version_compatible": "1"})
    with pytest.raises(EngineError, match=r"was built for TensorRT 10\.3\.0, here it is 10\.13\.2"):
        load_plan(published(tmp_path, key), module=fake_module(version="10.13.2"))
    plan = load_plan(tmp_path / key.digest())
    assert plan.kept[0].engine_host_code_allowed is False, "no plan brings code of its own"


def test_plugins_are_known_before_a_plan_is_read(tmp_path: Path) -> None:
    module, calls = fake_module(), []
    real = module.Runtime

    class Runtime(real):  # type: ignore[misc,valid-type]  # the module is made at run time
        def deserialize_cuda_engine(self, data: Any) -> Any:
            calls.append("deserialise")
            return super().deserialize_cuda_engine(data)

    module.Runtime = Runtime
    module.init_libnvinfer_plugins = lambda logger, namespace: calls.append(f"plugins of {namespace!r}")
    load_plan(plan_bytes(tmp_path), module=module)
    assert calls == ["plugins of ''", "deserialise"]


def test_a_plan_that_was_touched_never_reaches_tensorrt(tmp_path: Path) -> None:
    folder = published(tmp_path)
    data = bytearray((folder / "model.plan").read_bytes())
    data[-1] ^= 1
    (folder / "model.plan").write_bytes(data)
    with pytest.raises(EngineError, match=r"model\.plan is not the file that was published"):
        open_engine(folder)
    (folder / "model.plan").write_bytes(data[:-1])
    with pytest.raises(EngineError, match=r"engine.json and the files beside it disagree"):
        load_plan(folder)


def test_a_record_of_another_runtime_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="names the runtime 'onnxruntime', plans are of tensorrt or tensorrt_rtx"):
        load_plan(published(tmp_path, dataclasses.replace(KEY, runtime="onnxruntime")))


def test_a_build_that_is_being_looked_at_has_no_record(tmp_path: Path) -> None:
    assert load_plan(plan_bytes(tmp_path)).artefact == str(tmp_path / "model.plan")


def test_what_tensorrt_says_is_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(b"no plan at all")
    with pytest.raises(EngineError, match=r"cannot be loaded by TensorRT 10.3.0: .*Magic tag does not match; convert the model again"):
        load_plan(tmp_path)


def test_a_runtime_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    module = fake_module()

    def runtime(logger: Any) -> Any:
        logger.log(module.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    module.Runtime = runtime
    with pytest.raises(EngineError, match=r"TensorRT 10.3.0 cannot start: CUDA initialization failure with error: 35"):
        load_plan(plan_bytes(tmp_path), module=module)


def test_a_type_without_numpy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="'values' is BF16, which numpy does not know"):
        load_plan(plan_bytes(tmp_path, TensorProto.BFLOAT16))


def test_nothing_of_tensorrt_is_touched_without_a_driver(tmp_path: Path) -> None:
    folder = plan_bytes(tmp_path)
    with pytest.raises(EngineError, match=r"needs an NVIDIA GPU and its driver: no CUDA driver: libcuda"):
        load_plan(folder, device=Device("cpu", "cpu", reason="no CUDA driver: libcuda.so.1: cannot open"), module=object())


OPEN = """
import sys
from pathlib import Path
from models.device import Device
from models.engines import EngineError, EngineOptions
from models.engines.tensorrt_plan import open_plan

try:
    open_plan(Path(sys.argv[1]), EngineOptions(), Device("cuda", "Orin", "87"))
except EngineError as error:
    sys.exit(f"EngineError: {error}")
"""


def build_rtx_plan(folder: Path) -> Path:
    """A plan of the real TensorRT-RTX, whose builder needs no GPU."""
    trt = pytest.importorskip("tensorrt_rtx")
    folder.mkdir(parents=True, exist_ok=True)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    made = model(
        {"values": (TensorProto.FLOAT, ["n", 3])},
        [helper.make_node("Add", ["values"] * 2, ["sum"])],
        {"sum": (TensorProto.FLOAT, ["n", 3])},
    )
    assert parser.parse(made.SerializeToString())
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("values", (1, 3), (2, 3), (4, 3))
    config.add_optimization_profile(profile)
    (folder / "model.plan").write_bytes(bytes(builder.build_serialized_network(network, config)))
    return folder


def test_the_real_runtime_without_a_driver_ends_in_our_error(tmp_path: Path) -> None:
    """In a process of its own, for it might crash. The device is a lie, so that TensorRT is asked at all."""
    folder = build_rtx_plan(tmp_path)
    done = subprocess.run([sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, timeout=60)
    if done.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert done.returncode == 1
    assert "EngineError" in done.stderr
    assert "cudaError" in done.stderr


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_open_engine_finds_the_plan_and_asks_the_driver_first(tmp_path: Path) -> None:
    folder = build_rtx_plan(tmp_path)
    (folder / "model.onnx").write_bytes(b"not what is opened")
    with pytest.raises(EngineError, match=r"model.plan needs an NVIDIA GPU and its driver"):
        open_engine(folder)
