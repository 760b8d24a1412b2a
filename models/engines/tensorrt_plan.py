"""A plan of TensorRT, checked against the record beside it and loaded: what it takes, what it gives, within which shapes.

API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/Engine.html
"""

from __future__ import annotations

import importlib
import mmap
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, FrozenSet, Mapping, Optional, Tuple

from models.device import Device
from models.engine_record import RECORD_NAME, EngineRecord, published_precision, read_engine
from models.engines import EngineError, EngineOptions, TensorSpec
from models.engines.tensorrt_logger import logger_of

ARTEFACT = "model.plan"
MODULES = ("tensorrt", "tensorrt_rtx")
RTX_MARK = b"vtrt"  # the first bytes of a plan of TensorRT-RTX

# numpy has no type for BF16, FP8, FP4 and INT4; `tensorrt.nptype` of 8.5 fails with today's numpy.
DTYPES: Dict[str, str] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}

Shapes = Tuple[Tuple[int, ...], ...]


@dataclass(frozen=True)
class Plan:
    """A deserialised plan. It keeps all that TensorRT needs alive as long as the engine.

    host_inputs   inputs that TensorRT reads from host memory: values that decide shapes
    profiles      for each optimisation profile, input name to its (least, most likely, largest) shape
    """

    artefact: str
    module: Any
    engine: Any
    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    host_inputs: FrozenSet[str]
    profiles: Tuple[Mapping[str, Shapes], ...]
    kept: Tuple[Any, ...] = field(default=(), repr=False)

    def profile_for(self, shapes: Mapping[str, Tuple[int, ...]]) -> int:
        """The first profile that admits `shapes`: builders put the narrowest first. Raises EngineError."""
        for index, profile in enumerate(self.profiles):
            if _misfit(profile, shapes) is None:
                return index
        raise EngineError(f"{self.artefact}: {_misfit(self.profiles[-1], shapes)}; convert the model again with a wider profile")


def open_plan(folder: Path, options: EngineOptions, device: Device, load: Callable[[str], Any] = importlib.import_module) -> Plan:
    """Load `folder`/model.plan for `device`. Raises EngineError.

    A folder without a record is a build that is being looked at before it is published. `device` has to come from the driver: without one
    TensorRT's Runtime may end the process.
    """
    path = folder / ARTEFACT
    if device.kind != "cuda":
        raise EngineError(f"{path} needs an NVIDIA GPU and its driver: {device.reason}")
    stored = read_engine(folder)
    if stored is None and (folder / RECORD_NAME).exists():
        raise EngineError(f"{folder}: {RECORD_NAME} and the files beside it disagree; convert the model again")
    with path.open("rb") as stream, closing(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)) as data:
        name = stored.record.key.runtime if stored else MODULES[data[:4] == RTX_MARK]
        module = _module(name, path, load)
        if stored is not None:
            refusal = record_refusal(stored.record, device, module.__version__, options.precision)
            if refusal is not None:
                raise EngineError(f"{path} {refusal}; convert the model again")
        return _deserialise(data, module, str(path))


def record_refusal(record: EngineRecord, device: Device, version: str, precision: str) -> Optional[str]:
    """Why a plan with this record must not be loaded here; None when it may. `precision`: of the plan that whoever opens it was
    told of; its checksum says that the record is of this plan.

    A plan built VERSION_COMPATIBLE would load under another TensorRT, with code that it carries itself; but nothing proved it there, so it
    is refused like any other and built anew while the path at hand serves (docs/decisions.md).
    """
    key, published = record.key, published_precision(record)
    facts = (
        ("TensorRT", key.runtime_version, version),
        ("the device", key.device, device.key),
        ("L4T", key.options.get("l4t", ""), device.l4t),
        ("precision", published, published if precision == "auto" else precision),
    )
    for what, built, here in facts:
        if built != here:
            return f"was built for {what} {built or 'none'}, here it is {here or 'none'}"
    return None


def _module(name: str, path: Path, load: Callable[[str], Any]) -> Any:
    if name not in MODULES:
        raise EngineError(f"{path}: its record names the runtime {name!r}, plans are of {' or '.join(MODULES)}; convert the model again")
    try:
        return load(name)
    except ImportError as error:
        raise EngineError(f"{path} needs the module {name} for this interpreter: {error}") from error


def _deserialise(data: Any, module: Any, artefact: str) -> Plan:
    logger = logger_of(module)
    logger.forget()
    try:
        runtime = module.Runtime(logger)
    except TypeError as error:  # the factory returned nothing: how the bindings tell that CUDA failed
        raise EngineError(f"{artefact}: TensorRT {module.__version__} cannot start: {logger.last_words()}") from error
    if hasattr(module, "init_libnvinfer_plugins"):  # TensorRT-RTX has none; a plan of TensorRT may hold NVIDIA's own plugins
        module.init_libnvinfer_plugins(logger, "")
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(f"{artefact} cannot be loaded by TensorRT {module.__version__}: {logger.last_words()}; convert the model again")
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT]
    host = frozenset(name for name in inputs if engine.get_tensor_location(name) == module.TensorLocation.HOST)
    return Plan(
        artefact=artefact,
        module=module,
        engine=engine,
        inputs=tuple(_spec(engine, name, artefact) for name in inputs),
        outputs=tuple(_spec(engine, name, artefact) for name in names if name not in inputs),
        host_inputs=host,
        profiles=tuple(_profile(engine, inputs, host, index) for index in range(engine.num_optimization_profiles)),
        kept=(runtime, logger),
    )


def _spec(engine: Any, name: str, artefact: str) -> TensorSpec:
    kind = engine.get_tensor_dtype(name).name
    if kind not in DTYPES:
        raise EngineError(f"{artefact}: {name!r} is {kind}, which numpy does not know; convert the model with {', '.join(DTYPES.values())}")
    return TensorSpec(name, DTYPES[kind], tuple(engine.get_tensor_shape(name)))


def _profile(engine: Any, inputs: Any, host: FrozenSet[str], index: int) -> Dict[str, Shapes]:
    return {name: tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, index)) for name in inputs if name not in host}


def _misfit(profile: Mapping[str, Shapes], shapes: Mapping[str, Tuple[int, ...]]) -> Optional[str]:
    for name, shape in shapes.items():
        if name in profile:
            least, _, largest = profile[name]
            if len(shape) != len(least) or not all(low <= size <= high for low, size, high in zip(least, shape, largest)):
                return f"input {name!r} has shape {list(shape)}, the plan was built for {list(least)} to {list(largest)}"
    return None
