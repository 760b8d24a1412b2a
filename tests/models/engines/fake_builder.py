"""The part of TensorRT that our converter uses, over ONNX: a plan is the graph that was parsed, as `fake_tensorrt.py` runs it.

It behaves as its version does: 8.5 has flags, an explicit batch and no progress; 10.3 has flags and typed networks; 11.4 typed networks
only. With the flag FP16 it rounds what is not pinned. Environment variables make it slow or faulty, see `Whims`.
"""

from __future__ import annotations

import enum
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
from onnx import TensorProto, numpy_helper, shape_inference

from tests.models.engines.fake_tensorrt import DataType, ILogger, plan_bytes

PARTS = ("Optimizing the graph", "Timing kernels", "Writing the engine")
KINDS = {1: DataType.FLOAT, 10: DataType.HALF, 3: DataType.INT8, 6: DataType.INT32, 7: DataType.INT64, 9: DataType.BOOL, 2: DataType.UINT8}
TYPES = {"Conv": "CONVOLUTION", "Relu": "ACTIVATION", "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE", "Reshape": "SHUFFLE"}
TYPES.update({"Transpose": "SHUFFLE", "Gather": "GATHER", "Concat": "CONCATENATION", "Cast": "CAST", "Slice": "SLICE", "Shape": "SHAPE"})
LayerType = enum.Enum("LayerType", sorted({*TYPES.values(), "ELEMENTWISE", "ASSERTION", "CONSTANT", "IDENTITY"}))  # type: ignore[misc]
NEVER = frozenset({"LayerNormalization"})  # what 8.5 has no importer for


@dataclass(frozen=True)
class Whims:
    """FAKE_TENSORRT, a JSON object.

    weight, by    a weight whose name begins so comes into the plan multiplied, in every `when`: half (half precision anywhere), unpinned
                  (half precision without a layer in fp32), always
    fails         patterns: a build in half precision without such a layer in fp32 finds no kernel for it
    step_s        how long each of the thirty steps of a build takes
    """

    weight: str = ""
    by: float = 1.0
    when: str = "half"
    fails: str = ""
    step_s: float = 0.0


def whims() -> Whims:
    return Whims(**json.loads(os.environ.get("FAKE_TENSORRT", "{}")))


class Memory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class Cache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> Memory:
        return Memory(self.content or b"timed")

    def combine(self, other: Cache, ignores_mismatch: bool) -> bool:
        self.content += other.content
        return not ignores_mismatch


@dataclass
class Layer:
    """One for each node; TensorRT makes more of some."""

    name: str
    type: Any
    kinds: list[Any]
    pinned: bool = False
    num_outputs: int = 1
    outputs: dict[int, Any] = field(default_factory=dict)

    @property
    def precision(self) -> Any:
        return DataType.FLOAT

    @precision.setter
    def precision(self, kind: Any) -> None:
        self.pinned = kind is DataType.FLOAT

    def set_output_type(self, index: int, kind: Any) -> None:
        self.outputs[index] = kind

    def get_output(self, index: int) -> Any:
        return SimpleNamespace(is_execution_tensor=True, dtype=self.kinds[index])


class Network:
    def __init__(self, is_typed: bool, is_explicit: bool) -> None:
        self.is_typed, self.is_explicit = is_typed, is_explicit
        self.model: Any = None
        self.layers: list[Layer] = []

    def fill(self, model: Any) -> None:
        self.model = model
        kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
        for node in model.graph.node:
            made = [KINDS.get(kinds.get(name, 0), DataType.INT32) for name in node.output]
            self.layers.append(Layer(node.name, LayerType[TYPES.get(node.op_type, "ELEMENTWISE")], made, num_outputs=len(made)))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    @property
    def num_outputs(self) -> int:
        return len(self.model.graph.output)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]

    def get_input(self, index: int) -> Any:
        value = self.model.graph.input[index]
        shape = tuple(each.dim_value or -1 for each in value.type.tensor_type.shape.dim)
        return SimpleNamespace(name=value.name, shape=shape, is_shape_tensor=False)


class Profile(dict):  # type: ignore[type-arg]
    def set_shape(self, name: str, *sizes: Any) -> None:
        self[name] = [list(each) for each in sizes]


class Parser:
    def __init__(self, network: Network, logger: Any) -> None:
        self.network, self.logger, self.num_errors = network, logger, 0

    def set_flag(self, flag: Any) -> None: ...

    def parse_from_file(self, path: str) -> bool:
        model = shape_inference.infer_shapes(onnx.load(path))
        shapes = {value.name: value.type for value in model.graph.value_info}
        for value in model.graph.output:
            if not value.type.tensor_type.HasField("shape"):
                value.type.CopyFrom(shapes[value.name])
        refused = [node for node in model.graph.node if node.op_type in NEVER]
        if self.is_old and (refused or not self.network.is_explicit):
            why = f"No importer registered for op: {refused[0].op_type}" if refused else "the network has no explicit batch"
            self.num_errors = 1
            self.logger.log(ILogger.ERROR, why)
            self.error = SimpleNamespace(node=lambda: 0, code=lambda: "UNSUPPORTED_NODE", desc=lambda: why)
            return False
        self.network.fill(model)
        return True

    is_old = False

    def get_error(self, index: int) -> Any:
        return self.error


class Config:
    default_device_type: Any = None
    DLA_core = -1
    progress_monitor: Any = None

    def __init__(self) -> None:
        self.flags = {"TF32"}
        self.profiles: list[Profile] = []
        self.cache = Cache(b"")

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None: ...

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def can_run_on_DLA(self, layer: Layer) -> bool:  # noqa: N802  (TensorRT's name)
        return layer.type.name in ("CONVOLUTION", "ACTIVATION", "ELEMENTWISE")

    def create_timing_cache(self, content: bytes) -> Cache:
        return Cache(content)

    def set_timing_cache(self, cache: Cache, ignores_mismatch: bool) -> bool:
        self.cache = cache
        return not ignores_mismatch

    def get_timing_cache(self) -> Cache:
        return self.cache


class Builder:
    num_DLA_cores = 2  # noqa: N815  (TensorRT's name)
    version = ""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> Network:
        major = int(self.version.split(".")[0])
        return Network(is_typed=major > 10 or bool(flags & 2), is_explicit=bool(flags & 1))

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> Memory | None:
        if not self._take_time(config.progress_monitor):
            return None
        model, is_half = rounded(network, config.flags)
        wanted, pinned = whims(), [layer.name for layer in network.layers if layer.pinned]
        if wanted.fails and is_half and not any(fnmatchcase(name, wanted.fails) for name in pinned):
            words = f"Error Code 10: Internal Error (Could not find any implementation for node {wanted.fails}.)"
            self.logger.log(ILogger.ERROR, words)
            return None
        if wanted.weight and {"always": True, "half": is_half, "unpinned": is_half and not pinned}[wanted.when]:
            change(model, wanted)
        facts = {
            "profiles": config.profiles or [Profile()],
            "narrow": self.version.startswith("8."),
            "host": [],
            "layers": self._placed(network, config),
        }
        return Memory(plan_bytes(model, **facts))

    def _take_time(self, monitor: Any) -> bool:
        pace = whims().step_s
        for part in PARTS:
            if monitor is not None:
                monitor.phase_start(part, None, 10)
            self.logger.log(ILogger.VERBOSE, {"Timing kernels": "Constructing optimization profile number 0"}.get(part, part))
            for step in range(10):
                time.sleep(pace)
                if monitor is not None and not monitor.step_complete(part, step):
                    return False
            if monitor is not None:
                monitor.phase_finish(part)
        return True

    def _placed(self, network: Network, config: Config) -> list[dict[str, str]]:
        """Runs of layers on the DLA are one there; it takes no single ones, which cost more to hand over than they save."""
        runs: list[tuple[bool, list[str]]] = []
        for layer in network.layers:
            is_there = config.default_device_type is DeviceType.DLA and config.can_run_on_DLA(layer)
            if not runs or runs[-1][0] is not is_there:
                runs.append((is_there, []))
            runs[-1][1].append(layer.name)
        placed: list[dict[str, str]] = []
        for is_there, names in runs:
            if is_there and len(names) > 1:
                placed.append({"Name": f"{{ForeignNode[{names[0]}...{names[-1]}]}}", "LayerType": "DLA"})
            else:
                placed += [{"Name": name, "LayerType": "kgen"} for name in names]
        return placed


def rounded(network: Network, flags: set[str]) -> tuple[Any, bool]:
    """The graph as the engine computes it, and whether it has half precision anywhere."""
    model = onnx.ModelProto()
    model.CopyFrom(network.model)
    has_halves = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    is_quantised = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if network.is_typed or "FP16" not in flags or is_quantised:
        return model, has_halves or "FP16" in flags
    from converters.half_from_onnx import half_from_onnx

    obeys = "OBEY_PRECISION_CONSTRAINTS" in flags
    kept = [layer.name.translate({ord("["): "?", ord("]"): "?"}) for layer in network.layers if layer.pinned and obeys]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.onnx"), Path(folder, "half.onnx")
        onnx.save(model, str(source))
        half_from_onnx(source, target, kept)
        return onnx.load(str(target)), True


def change(model: Any, wanted: Whims) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.startswith(wanted.weight):
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array((values * wanted.by).astype(values.dtype), tensor.name))
            return
    raise AssertionError(f"{wanted.weight} is no weight of {[tensor.name for tensor in model.graph.initializer]}")


class DeviceType(enum.Enum):
    GPU, DLA = range(2)


def builder_module(version: str) -> dict[str, Any]:
    """What a module of that version has for building, by name."""
    major, minor = map(int, version.split(".")[:2])
    is_old, has_flags = major < 9, major < 11
    creation = ["EXPLICIT_BATCH"] if is_old else ["EXPLICIT_BATCH", "STRONGLY_TYPED"] if has_flags else ["STRONGLY_TYPED"]
    flags = ["TF32", "GPU_FALLBACK", *(["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"] if has_flags else [])]
    level = {} if (major, minor) < (8, 6) else {"builder_optimization_level": 3, "hardware_compatibility_level": None}
    found: dict[str, Any] = {
        "NetworkDefinitionCreationFlag": enum.IntEnum("NetworkDefinitionCreationFlag", creation, start=0),
        "BuilderFlag": enum.Enum("BuilderFlag", flags if is_old else [*flags, "VERSION_COMPATIBLE"]),
        "MemoryPoolType": enum.Enum("MemoryPoolType", ["WORKSPACE"]),
        "HardwareCompatibilityLevel": enum.Enum("HardwareCompatibilityLevel", ["NONE", "AMPERE_PLUS"]),
        "ProfilingVerbosity": enum.Enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED"]),
        "LayerInformationFormat": enum.Enum("LayerInformationFormat", ["ONELINE", "JSON"]),
        "OnnxParserFlag": enum.Enum("OnnxParserFlag", ["NATIVE_INSTANCENORM"]),
        "LayerType": LayerType,
        "DeviceType": DeviceType,
        "IBuilderConfig": type("IBuilderConfig", (Config,), level),
        "Builder": type("Builder", (Builder,), {"version": version}),
        "OnnxParser": type("OnnxParser", (Parser,), {"is_old": is_old}),
        "float32": DataType.FLOAT,
        "float16": DataType.HALF,
        "init_libnvinfer_plugins": lambda logger, namespace: True,
    }
    if not is_old:
        found["IProgressMonitor"] = type("IProgressMonitor", (), {})
    return found
