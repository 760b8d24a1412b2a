"""Which execution providers ONNX Runtime is asked for, and with which options. Pure, but for asking a library for its version.

Options: https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html and CUDA-ExecutionProvider.html
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from models.device import Device
from models.engines import EngineError, EngineOptions

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS: Dict[str, Tuple[str, ...]] = {"cpu": (CPU,), "cuda": (CUDA, CPU), "tensorrt": (TENSORRT, CUDA, CPU)}

# What the builder of the TensorRT provider may use beside float32; INT8 stands in the graph as Q/DQ and only has to be allowed.
PRECISIONS: Dict[str, Tuple[str, ...]] = {
    "auto": (),
    "fp32": (),
    "tf32": (),
    "fp16": ("trt_fp16_enable",),
    "int8": ("trt_fp16_enable", "trt_int8_enable"),
}
LIBRARIES = ("libnvinfer.so.10", "libnvinfer.so.8")

ProviderOptions = List[Tuple[str, Dict[str, str]]]


def refusal_of(options: EngineOptions) -> Optional[str]:
    """Why options contradict each other; None when they do not."""
    if options.provider not in PROVIDERS:
        return f"unknown provider {options.provider!r}; known are {', '.join(PROVIDERS)}"
    if options.provider != "tensorrt":
        given = [name for name in ("profiles", "cache_folder", "workspace_bytes") if getattr(options, name)]
        return f"{given[0]} is for provider 'tensorrt', not for {options.provider!r}; leave it out" if given else None
    if options.precision not in PRECISIONS:
        return f"provider 'tensorrt' has no precision {options.precision!r}; it has {', '.join(PRECISIONS)}"
    for name, shapes in options.profiles.items():
        if len(shapes) != 3 or len({len(shape) for shape in shapes}) != 1:
            return f"the profile of {name!r} is {shapes!r}, not three shapes of one rank: least, most likely, largest"
        if not all(0 < least <= usual <= largest for least, usual, largest in zip(*shapes)):
            return f"the profile of {name!r} does not grow from {list(shapes[0])} over {list(shapes[1])} to {list(shapes[2])}"
    return None


def provider_options(options: EngineOptions, model: str, device: Device, tensorrt: str) -> ProviderOptions:
    """Providers in the order of preference. `model` is a digest of the model, `tensorrt` the version of the library.

    Raises EngineError for options that contradict each other.
    """
    refusal = refusal_of(options)
    if refusal is not None:
        raise EngineError(refusal)
    made = {CPU: {}, CUDA: _cuda(options), TENSORRT: _tensorrt(options, model, device, tensorrt)}
    return [(name, made[name]) for name in PROVIDERS[options.provider]]


def cache_folder(options: EngineOptions, model: str, device: Device, tensorrt: str) -> Path:
    """Where engines of a model lie. ONNX Runtime does not notice that TensorRT, the GPU or the precision is another: the path does."""
    place = f"{device.name}-sm_{device.sm}-l4t_{device.l4t or 'none'}-tensorrt_{tensorrt or 'unknown'}-{options.precision}"
    return Path(options.cache_folder) / "".join(each if each.isalnum() or each in "._-" else "_" for each in place) / model


def library_version(load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """Version of the TensorRT that the provider links, e.g. `10.3.0`; empty where there is none."""
    for name in LIBRARIES:
        try:
            number = int(load(name).getInferLibVersion())
        except (OSError, AttributeError):
            continue
        # 8601 is 8.6.1; from 10 on 100300 is 10.3.0.
        major, rest = (number // 10000, number % 10000) if number >= 100000 else (number // 1000, number % 1000)
        return f"{major}.{rest // 100}.{rest % 100}"
    return ""


def _cuda(options: EngineOptions) -> Dict[str, str]:
    # The default doubles what it takes each time, from memory that a Jetson's CPU uses too.
    made = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested"}
    if options.precision in ("fp32", "tf32"):
        made["use_tf32"] = "1" if options.precision == "tf32" else "0"
    return made


def _tensorrt(options: EngineOptions, model: str, device: Device, tensorrt: str) -> Dict[str, str]:
    made = {"device_id": "0", **dict.fromkeys(PRECISIONS.get(options.precision, ()), "1")}
    if options.workspace_bytes:
        made["trt_max_workspace_size"] = str(options.workspace_bytes)
    if options.cache_folder:
        folder = cache_folder(options, model, device, tensorrt)
        made.update(trt_engine_cache_enable="1", trt_engine_cache_path=str(folder))
        made.update(trt_timing_cache_enable="1", trt_timing_cache_path=str(folder.parent))
    for index, side in enumerate(("min", "opt", "max")):
        if options.profiles:
            shapes = (f"{name}:{'x'.join(map(str, shape[index]))}" for name, shape in sorted(options.profiles.items()))
            made[f"trt_profile_{side}_shapes"] = ",".join(shapes)
    return made
