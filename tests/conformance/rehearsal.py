"""A program: `build_plan` against stand-ins that have exactly the attributes of a version's real classes. Runs under Python 3.8 too.

The bindings alone cannot build. So enums, loggers, monitors and errors are the real ones, and builder, network, config, parser, profile and
layers are ours: touching what the real class lacks raises AttributeError, and what was set is told.

Standard input: {"module": name, "requests": [request…]}; standard output: a JSON list of {"result" or "error", "seen": {…}}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from converters.tensorrt_from_onnx.errors import PlanError
from converters.tensorrt_from_onnx.plan import build_plan
from converters.tensorrt_from_onnx.request import parse_request

MODULE: Any = None
SEEN: dict[str, Any] = {}
REAL: dict[str, Any] = {}


def real_class(name: str) -> Any:
    return REAL.get(name) or getattr(MODULE, name)


class StandIn:
    """An object with the attributes of class `_real` of the module at hand, and no other."""

    _real = ""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            real = real_class(type(self)._real)
            if not hasattr(real, name):
                raise AttributeError(f"{real.__name__} of TensorRT {MODULE.__version__} has no {name}")
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            getattr(real_class(type(self)._real), name)
            SEEN.setdefault(type(self)._real, {})[name] = str(value)
        object.__setattr__(self, name, value)


class Inspector(StandIn):
    _real = "EngineInspector"

    def get_engine_information(self, form: Any) -> str:
        layers = [{"Name": "conv", "LayerType": "DLA"}, {"Name": "norm + norm_1", "LayerType": "kgen"}]
        return json.dumps({"Layers": layers} if form == MODULE.LayerInformationFormat.JSON else {})


class Engine(StandIn):
    _real = "ICudaEngine"

    def create_engine_inspector(self) -> Inspector:
        return Inspector()


class Runtime(StandIn):
    _real = "Runtime"

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialised: Any) -> Engine:
        return Engine()


class Memory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class Cache(StandIn):
    _real = "ITimingCache"

    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> Memory:
        return Memory(self._content + b"+timed")

    def combine(self, other: Any, ignores_mismatch: bool) -> bool:
        SEEN["combined"] = other._content.decode()
        return not ignores_mismatch


class Config(StandIn):
    _real = "IBuilderConfig"
    _cache: Any = None

    def set_flag(self, flag: Any) -> None:
        SEEN.setdefault("flags", []).append(flag.name)

    def clear_flag(self, flag: Any) -> None:
        SEEN.setdefault("cleared", []).append(flag.name)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        SEEN["pool"] = [pool.name, size]

    def add_optimization_profile(self, profile: Any) -> int:
        return 0

    def can_run_on_DLA(self, layer: Any) -> bool:  # noqa: N802  (TensorRT's name)
        return str(layer.type).endswith("CONVOLUTION")

    def create_timing_cache(self, content: bytes) -> Cache:
        return Cache(content)

    def set_timing_cache(self, cache: Cache, ignores_mismatch: bool) -> bool:
        SEEN["timing_cache"] = cache._content.decode()
        self._cache = cache
        return not ignores_mismatch

    def get_timing_cache(self) -> Cache:
        return self._cache  # type: ignore[no-any-return]  # set above


class Tensor(StandIn):
    _real = "ITensor"
    is_execution_tensor = True
    is_shape_tensor = False

    def __init__(self, name: str, shape: Any, kind: Any) -> None:
        for attribute, value in (("name", name), ("shape", shape), ("dtype", kind)):
            object.__setattr__(self, attribute, value)


class Layer(StandIn):
    _real = "ILayer"
    num_outputs = 1

    def __init__(self, name: str, kind: Any, output: Any) -> None:
        for attribute, value in (("name", name), ("type", kind), ("_output", Tensor(name, (1,), output))):
            object.__setattr__(self, attribute, value)

    def __setattr__(self, name: str, value: Any) -> None:
        StandIn.__setattr__(self, name, value)
        SEEN.setdefault("pinned", []).append(self.name)

    def set_output_type(self, index: int, kind: Any) -> None:
        SEEN.setdefault("outputs", []).append([self.name, str(kind)])

    def get_output(self, index: int) -> Any:
        return self._output


class Network(StandIn):
    _real = "INetworkDefinition"
    num_inputs = num_outputs = 1

    def __init__(self) -> None:
        kinds, trt = MODULE.LayerType, MODULE
        self._layers = [
            Layer("conv", kinds.CONVOLUTION, trt.float32),
            Layer("norm", kinds.REDUCE, trt.float32),
            Layer("norm_1", kinds.ELEMENTWISE, trt.float32),
            Layer("norm_2", kinds.SHUFFLE, trt.float32),
            Layer("norm/index", kinds.TOPK, trt.int32),
            Layer("quantise", kinds.QUANTIZE, trt.int8),
        ]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> Layer:
        return self._layers[index]

    def get_input(self, index: int) -> Tensor:
        return Tensor("x", (-1, 3), MODULE.float32)


class Profile(StandIn):
    _real = "IOptimizationProfile"

    def set_shape(self, name: str, *sizes: Any) -> None:
        SEEN["profile"] = [name, list(map(list, sizes))]


class Parser(StandIn):
    _real = "OnnxParser"
    num_errors = 0

    def __init__(self, network: Any, logger: Any) -> None:
        self._logger = logger

    def parse_from_file(self, path: str) -> bool:
        self._logger.log(MODULE.ILogger.Severity.VERBOSE, "Parsing node: conv [Conv]")
        return True

    def set_flag(self, flag: Any) -> None:
        SEEN.setdefault("parser_flags", []).append(flag.name)


class Builder(StandIn):
    _real = "Builder"
    num_DLA_cores = 2  # noqa: N815  (TensorRT's name)

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> Network:
        SEEN["network_flags"] = flags
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        if hasattr(config, "progress_monitor"):
            monitor = config.progress_monitor
            monitor.phase_start("Building engine", None, 2)
            SEEN["goes_on"] = monitor.step_complete("Building engine", 0)
            monitor.phase_finish("Building engine")
        self._logger.log(MODULE.ILogger.Severity.ERROR, "Could not find any implementation for node norm.")
        return None if os.environ.get("REHEARSAL_FAILS") else Memory(b"plan")


def main() -> None:
    global MODULE  # noqa: PLW0603  (a program, and the stand-ins' only tie to the module)
    asked = json.load(sys.stdin)
    MODULE = importlib.import_module(asked["module"])
    outcomes: list[dict[str, Any]] = []
    try:
        MODULE.Builder(MODULE.Logger())
        outcomes.append({"builder": "made"})
    except TypeError as error:
        outcomes.append({"builder": str(error)})
    for stand_in in (Builder, Parser, Runtime):
        REAL[stand_in._real] = getattr(MODULE, stand_in._real)
        setattr(MODULE, stand_in._real, stand_in)
    MODULE.init_libnvinfer_plugins = lambda logger, namespace: True  # the real one is in a library that is not here
    for request in asked["requests"]:
        SEEN.clear()
        lines: list[str] = []

        def report(phase: str, fraction: float, message: str, lines: list[str] = lines) -> None:
            lines.append(message)

        try:
            result = build_plan(parse_request(json.dumps(request).encode()), report)
            outcome: dict[str, Any] = {"result": result.to_json()}
        except PlanError as error:
            outcome = {"error": error.to_json()}
        outcomes.append(dict(outcome, seen=dict(SEEN), lines=lines))
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
