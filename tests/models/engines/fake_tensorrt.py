"""The part of TensorRT that our engines use, over ONNX Runtime: a plan holds an ONNX model and profiles, memory is that of `fake_cuda`.

It is as strict as the original where that is silent or crashes: addresses are checked and have to be aligned, a graph cannot be captured
before a run with the same shapes, and a graph that is launched after its context was changed fails.
"""

from __future__ import annotations

import ctypes
import enum
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime

from models.device import Device
from models.engines import EngineOptions
from models.engines.tensorrt_plan import Plan, open_plan
from tests.models.engines.fake_cuda import ALIGNMENT, STREAMS

GPU = Device("cuda", "Orin", "87", 8 << 30, is_integrated=True, l4t="36.4.3", driver="12.6")
MAGIC = b"ftrt"
Profile = Mapping[str, Sequence[Sequence[int]]]


def write_plan(folder: Path, model: onnx.ModelProto, profiles: Sequence[Profile], narrow: bool = False, host: Sequence[str] = ()) -> Path:
    """Write model.plan. `narrow`: int64 becomes int32, as TensorRT 8 does; `host`: inputs that are read from host memory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.plan").write_bytes(plan_bytes(model, profiles=profiles, narrow=narrow, host=list(host)))
    return folder


def plan_bytes(model: onnx.ModelProto, **facts: Any) -> bytes:
    text = json.dumps(facts).encode()
    content: bytes = model.SerializeToString()
    return MAGIC + struct.pack("<I", len(text)) + text + content


def load_plan(folder: Path, options: EngineOptions | None = None, device: Device = GPU, module: Any = None) -> Plan:
    return open_plan(folder, options or EngineOptions(), device, lambda name: module or fake_module(name))


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, INT64, BF16 = range(8)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)
    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)


class IOutputAllocator:
    pass


def fake_module(name: str = "tensorrt", version: str = "10.3.0") -> Any:
    module = SimpleNamespace(__name__=f"fake_{name}", __version__=version, Runtime=Runtime)
    for each in (ILogger, IOutputAllocator, TensorIOMode, TensorLocation, DataType):
        setattr(module, each.__name__, each)
    return module


class Runtime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    # As in TensorRT itself, code that a plan carries does not run unless it is told to.
    engine_host_code_allowed = False

    def deserialize_cuda_engine(self, data: Any) -> Engine | None:
        plan = bytes(data)
        if not plan.startswith(MAGIC):
            self.logger.log(ILogger.ERROR, "Serialization assertion magicTagRead == kMAGIC_TAG failed. Magic tag does not match")
            return None
        (size,) = struct.unpack_from("<I", plan, len(MAGIC))
        facts = json.loads(plan[len(MAGIC) + 4 :][:size])
        return Engine(self.logger, onnx.load_from_string(plan[len(MAGIC) + 4 + size :]), **facts)


KINDS = {1: DataType.FLOAT, 2: DataType.UINT8, 3: DataType.INT8, 6: DataType.INT32, 7: DataType.INT64, 9: DataType.BOOL, 10: DataType.HALF}
KINDS[16] = DataType.BF16
NUMPY = {DataType.FLOAT: "f4", DataType.HALF: "f2", DataType.INT8: "i1", DataType.INT32: "i4", DataType.BOOL: "?", DataType.UINT8: "u1"}
NUMPY[DataType.INT64] = "i8"


class Engine:
    def __init__(
        self, logger: Any, model: onnx.ModelProto, profiles: Any, narrow: bool, host: Sequence[str], layers: Sequence[Any] = ()
    ) -> None:
        self.logger = logger
        self.model = model
        self.profiles = profiles
        self.narrow = narrow
        self.host = host
        self.layers = layers
        self.values = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.output)}
        self.names = list(self.values)
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(profiles)

    def get_tensor_name(self, index: int) -> str:
        name: str = self.names[index]
        return name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in {value.name for value in self.model.graph.input} else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        kind = KINDS[self.values[name].elem_type]
        return DataType.INT32 if self.narrow and kind is DataType.INT64 else kind

    def get_tensor_shape(self, name: str) -> list[int]:
        return [each.dim_value or -1 for each in self.values[name].shape.dim]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self.host else TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        shapes: list[list[int]] = self.profiles[index].get(name) or [self.get_tensor_shape(name)] * 3
        return shapes

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": self.layers, "Bindings": self.names}))

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.session = onnxruntime.InferenceSession(engine.model.SerializeToString(), providers=["CPUExecutionProvider"])
        self.profile = 0
        self.state = 0
        self.ran = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}
        self.inputs = [name for name in engine.names if engine.get_tensor_mode(name) is TensorIOMode.INPUT]

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile, self.shapes = index, {}
        self.state += 1
        return stream in STREAMS

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        if not all(low <= size <= high for low, size, high in zip(least, shape, most)):
            return self.refuse(f"setInputShape: {name} {shape} is not within profile {self.profile}")
        self.shapes[name] = tuple(shape)
        self.state += 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address == 0 or address % ALIGNMENT:
            return self.refuse(f"setTensorAddress: {name} at {address:#x} is not aligned")
        self.addresses[name] = address
        self.state += 1
        return True

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        assert isinstance(allocator, IOutputAllocator)
        self.allocators[name] = allocator
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.inputs if name not in self.shapes or (name in self.engine.host and name not in self.addresses)]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        known = {
            each.dim_param: size for given, shape in self.shapes.items() for each, size in zip(self.engine.values[given].shape.dim, shape)
        }
        return tuple(each.dim_value or known.get(each.dim_param, -1) for each in self.engine.values[name].shape.dim)

    def execute_async_v3(self, stream: int) -> bool:
        device = STREAMS[stream]
        if device.is_capturing and self.ran != self.state:
            return self.refuse("enqueueV3: cannot be captured before shapes were used once")
        outputs = [name for name in self.engine.names if name not in self.inputs]
        if self.infer_shapes() or any(name not in self.addresses and name not in self.allocators for name in (*self.inputs, *outputs)):
            return self.refuse("enqueueV3: not all shapes and addresses are set")
        state, self.ran = self.state, self.state
        addresses, shapes = dict(self.addresses), dict(self.shapes)

        def execute() -> None:
            assert self.state == state or not was_captured, "the context was changed after its graph was captured"
            feeds = {name: self.read(device, name, addresses[name], shapes[name]) for name in self.inputs}
            for name, value in zip(outputs, self.session.run(outputs, feeds)):
                self.write(device, name, value, addresses.get(name, 0))

        was_captured = device.is_capturing
        device.queue(execute)
        if self.allocators:  # the size of what comes next is known only when this is done
            device.synchronize()
        return True

    def read(self, device: Any, name: str, address: int, shape: tuple[int, ...]) -> np.ndarray:
        kind = np.dtype(NUMPY[self.engine.get_tensor_dtype(name)])
        size = kind.itemsize * int(np.prod(shape))
        device.check(address, size)
        array = np.frombuffer(ctypes.string_at(address, size), kind).reshape(shape)
        return array.astype(np.int64) if self.engine.narrow and KINDS[self.engine.values[name].elem_type] is DataType.INT64 else array

    def write(self, device: Any, name: str, value: np.ndarray, address: int) -> None:
        data = np.ascontiguousarray(value.astype(NUMPY[self.engine.get_tensor_dtype(name)]))
        if name in self.allocators:
            address = self.allocators[name].reallocate_output(name, address, data.nbytes, ALIGNMENT)
            assert address
            self.allocators[name].notify_shape(name, data.shape)
        if data.nbytes:
            device.check(address, data.nbytes)
            ctypes.memmove(address, data.ctypes.data, data.nbytes)

    def refuse(self, words: str) -> bool:
        self.engine.logger.log(ILogger.ERROR, words)
        return False
