"""Engines of TensorRT against ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from converters.decoder_profiles import decoder_profiles
from models.device import Device, probe_device
from models.engines import EngineOptions, SlotTokens
from models.engines.device_memory import DeviceMemory
from models.engines.tensorrt import TensorRtEngine
from models.engines.tensorrt_generation import PAST_STEP, TensorRtGenerationEngine, open_generation
from models.engines.tensorrt_plan import open_plan
from tests.gpu.conftest import ROOT, build
from tests.models.engines.fake_cuda import FakeCuda
from tests.models.engines.fake_tensorrt import load_plan
from tests.models.engines.standard_decoder import DECODER, write_standard_onnx, write_standard_plan
from tests.models.engines.tiny_decoder import VOCABULARY

SLOTS, CHUNK = 4, 32


def compare(tensorrt: str, memory: DeviceMemory, onnx: Path, folder: Path, shape: tuple[int, int, int]) -> None:
    """Batches of 1 to 4 made-up pictures, some sizes twice and thrice for the graph, through both."""
    profile = {"pixel_values": [[batch, *shape] for batch in (1, 1, 4)]}
    engine = TensorRtEngine(open_plan(build(tensorrt, onnx, folder, [profile]), EngineOptions(), probe_device()), memory, captures=True)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 4
    reference = onnxruntime.InferenceSession(str(onnx), settings, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in engine.outputs]
    random = np.random.default_rng(0)
    for batch in (1, 1, 1, 1, 4, 4, 4, 2, 1):
        pixels = random.random((batch, *shape), dtype=np.float32)
        found = engine.run({"pixel_values": pixels})
        for name, expected in zip(names, reference.run(names, {"pixel_values": pixels}), strict=True):
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=5e-3 * scale, err_msg=f"{name} of {batch}")
    engine.close()


def test_conveyor_detr_gives_what_it_gives_on_the_cpu(tensorrt: str, memory: DeviceMemory, tmp_path: Path) -> None:
    compare(tensorrt, memory, ROOT / "models/weights/conveyor_detr.onnx", tmp_path, (3, 192, 320))


def test_deimv2_femto_gives_what_it_gives_on_the_cpu(tensorrt: str, memory: DeviceMemory, tmp_path: Path, test_data: Path) -> None:
    compare(tensorrt, memory, test_data / "models/deimv2_hgnetv2_femto_coco_raw.onnx", tmp_path, (3, 416, 416))


@pytest.fixture(scope="session", params=["fp32", "fp16"])
def decoder(request: pytest.FixtureRequest, tensorrt: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(precision, folder) of the decoder of two layers as a plan."""
    folder = tmp_path_factory.mktemp("decoder")
    source = write_standard_onnx(folder / "onnx", "float16" if request.param == "fp16" else "float32")
    profiles: list[dict[str, Any]] = [dict(each) for each in decoder_profiles(DECODER, SLOTS, DECODER.context_tokens, CHUNK)]
    build(tensorrt, source / "model.onnx", folder, profiles, request.param)
    (folder / "generation.json").write_bytes((source / "generation.json").read_bytes())
    return request.param, folder


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> TensorRtGenerationEngine:
    """The same decoder in float32 on the CPU, under the same engine: its device is host memory, its TensorRT is ONNX Runtime."""
    folder = write_standard_plan(tmp_path_factory.mktemp("reference"), slots=SLOTS, chunk=CHUNK)
    return open_generation(folder, load_plan(folder), FakeCuda(), EngineOptions(slots=SLOTS, context_tokens=256))


def test_a_decoder_with_its_cache_on_the_device_gives_the_logits_of_the_cpu(
    gpu: Device, memory: DeviceMemory, decoder: tuple[str, Path], reference: TensorRtGenerationEngine
) -> None:
    precision, folder = decoder
    options = EngineOptions(slots=SLOTS, context_tokens=256)
    engine = open_generation(folder, open_plan(folder, options, gpu), memory, options)
    tolerance = 2e-3 if precision == "fp32" else 5e-2
    tokens = np.random.default_rng(3).integers(3, VOCABULARY, 400).tolist()

    def step(*batch: tuple[int, list[int]]) -> None:
        items = [SlotTokens(slot, each) for slot, each in batch]
        found, expected = engine.step(items), reference.step(items)
        assert np.isfinite(found).all()
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max(), batch

    for each in (engine, reference):
        for slot in range(SLOTS):
            each.truncate(slot, 0)
    step((0, tokens[:100]), (2, tokens[100:103]))
    for index in range(PAST_STEP):  # one row: a graph, another where the past grows, rows that end unaligned
        step((0, [tokens[index]]))
    step((3, tokens[200:205]))
    for index in range(6):  # several rows, which are moved together first
        step((3, [tokens[index]]), (0, [tokens[index + 1]]), (2, [tokens[index + 2]]))
    for each in (engine, reference):
        each.copy(0, 1, 150)
        each.truncate(0, 60)
    step((1, tokens[300:333]), (0, [5]))
    step(*((slot, [slot + 7]) for slot in range(SLOTS)))
    engine.close()
