from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.device import Device
from models.engines import EngineError, EngineOptions
from models.engines.onnx_providers import cache_folder, library_version, provider_options

ORIN = Device("cuda", "Orin NX (8GB)", "87", l4t="36.4.3")
SHAPES = ((1, 3, 64, 64), (2, 3, 640, 640), (4, 3, 640, 640))


def names(options: EngineOptions) -> list[str]:
    return [name for name, _ in provider_options(options, "m", ORIN, "10.3.0")]


def test_each_provider_falls_back_to_the_next() -> None:
    assert names(EngineOptions()) == ["CPUExecutionProvider"]
    assert names(EngineOptions(provider="cuda")) == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert names(EngineOptions(provider="tensorrt"))[0] == "TensorrtExecutionProvider"


def test_options_of_the_tensorrt_provider(tmp_path: Path) -> None:
    profiles: dict[str, tuple[tuple[int, ...], ...]] = {"pixel_values": SHAPES, "mask": ((1, 64), (2, 640), (4, 640))}
    options = EngineOptions("tensorrt", precision="int8", workspace_bytes=1 << 28, cache_folder=str(tmp_path), profiles=profiles)
    made = dict(provider_options(options, "abc", ORIN, "10.3.0"))["TensorrtExecutionProvider"]
    place = tmp_path / "Orin_NX__8GB_-sm_87-l4t_36.4.3-tensorrt_10.3.0-int8"
    assert made == {
        "device_id": "0",
        "trt_fp16_enable": "1",
        "trt_int8_enable": "1",
        "trt_max_workspace_size": "268435456",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(place / "abc"),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(place),
        "trt_profile_min_shapes": "mask:1x64,pixel_values:1x3x64x64",
        "trt_profile_opt_shapes": "mask:2x640,pixel_values:2x3x640x640",
        "trt_profile_max_shapes": "mask:4x640,pixel_values:4x3x640x640",
    }
    assert dict(provider_options(EngineOptions("tensorrt"), "abc", ORIN, ""))["TensorrtExecutionProvider"] == {"device_id": "0"}


def test_whatever_makes_an_engine_useless_is_in_the_path_of_the_cache() -> None:
    options = EngineOptions("tensorrt", precision="fp16", cache_folder="/cache")
    places = {
        cache_folder(options, "a", ORIN, "10.3.0"),
        cache_folder(options, "b", ORIN, "10.3.0"),
        cache_folder(options, "a", ORIN, "10.7.0"),
        cache_folder(options, "a", dataclasses.replace(ORIN, sm="72"), "10.3.0"),
        cache_folder(options, "a", dataclasses.replace(ORIN, l4t="36.5.0"), "10.3.0"),
        cache_folder(dataclasses.replace(options, precision="fp32"), "a", ORIN, "10.3.0"),
    }
    assert len(places) == 6
    assert cache_folder(options, "a", dataclasses.replace(ORIN, name="../../x"), "1").parent.parent == Path("/cache")


def test_tf32_is_said_to_the_cuda_provider() -> None:
    found = [
        dict(provider_options(EngineOptions("cuda", precision=word), "m", ORIN, ""))["CUDAExecutionProvider"]
        for word in ("fp32", "tf32", "auto")
    ]
    assert [each.get("use_tf32") for each in found] == ["0", "1", None]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"provider": "rocm"}, "unknown provider 'rocm'; known are cpu, cuda, tensorrt"),
        ({"provider": "cuda", "profiles": {"x": SHAPES}}, "profiles is for provider 'tensorrt', not for 'cuda'"),
        ({"workspace_bytes": 5}, "workspace_bytes is for provider 'tensorrt'"),
        ({"provider": "tensorrt", "precision": "int4"}, "no precision 'int4'"),
        ({"provider": "tensorrt", "profiles": {"x": SHAPES[:2]}}, "not three shapes"),
        ({"provider": "tensorrt", "profiles": {"x": ((1,), (1, 2), (1,))}}, "of one rank"),
        ({"provider": "tensorrt", "profiles": {"x": ((1, 4), (2, 3), (4, 4))}}, r"does not grow from \[1, 4\] over \[2, 3\] to \[4, 4\]"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        provider_options(EngineOptions(**options), "m", ORIN, "")


def test_the_version_of_the_library_that_is_linked() -> None:
    def load(found: str, number: int) -> Any:
        def open_library(name: str) -> Any:
            if name != found:
                raise OSError(f"{name}: cannot open shared object file")
            return SimpleNamespace(getInferLibVersion=lambda: number)

        return open_library

    assert library_version(load("libnvinfer.so.10", 100300)) == "10.3.0"
    assert library_version(load("libnvinfer.so.10", 101601)) == "10.16.1"
    assert library_version(load("libnvinfer.so.8", 8502)) == "8.5.2"
    assert library_version(load("libcudart.so", 1)) == ""
