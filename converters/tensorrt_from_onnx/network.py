"""The network of an ONNX file and what is asked of it: profiles, layers that stay in fp32, a deep-learning accelerator."""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from typing import Any, List, Sequence, Tuple

from converters.tensorrt_from_onnx.callbacks import Messages
from converters.tensorrt_from_onnx.errors import PlanError, build_error, parse_error
from converters.tensorrt_from_onnx.module import Capabilities
from converters.tensorrt_from_onnx.request import PlanRequest, Profile

log = logging.getLogger(__name__)

# Layers that compute nothing: a precision pinned there only adds conversions, or is refused.
_MOVES_DATA = frozenset(
    ("ASSERTION", "CAST", "CONCATENATION", "CONSTANT", "DEQUANTIZE", "GATHER", "IDENTITY", "QUANTIZE", "SHAPE", "SHUFFLE", "SLICE")
)


def create_network(trt: Any, capabilities: Capabilities, request: PlanRequest, builder: Any) -> Any:
    """An empty network of the kind that the precision needs. Raises PlanError (`unsupported`)."""
    flags = trt.NetworkDefinitionCreationFlag
    if request.precision in ("fp16", "int8") and not capabilities.has_precision_flags:
        raise PlanError(
            "unsupported",
            f"{capabilities.name} takes the precision from the ONNX graph only: convert the graph to {request.precision} "
            "and ask for precision `typed`",
        )
    if request.precision == "typed" and not capabilities.has_typed_networks:
        raise PlanError(
            "unsupported",
            f"{capabilities.name} has no strongly typed networks: ask for fp16 or int8 with fp32_layers instead of `typed`",
        )
    if is_typed(request, capabilities):
        return builder.create_network(1 << int(flags.STRONGLY_TYPED))
    return builder.create_network(1 << int(flags.EXPLICIT_BATCH) if capabilities.needs_explicit_batch else 0)


def is_typed(request: PlanRequest, capabilities: Capabilities) -> bool:
    """Whether types come from the graph. Full precision needs no flags, so it is typed wherever that exists."""
    return capabilities.has_typed_networks and request.precision in ("typed", "fp32", "tf32")


def parse(trt: Any, request: PlanRequest, network: Any, logger: Any, messages: Messages) -> Any:
    """Fill the network from the ONNX file; weights beside it are found. Returns the parser, which must outlive the build."""
    parser = trt.OnnxParser(network, logger)
    if request.version_compatible and hasattr(trt, "OnnxParserFlag"):
        # The plug-in that InstanceNormalization otherwise becomes is in no lean runtime.
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
    if not parser.parse_from_file(str(request.onnx)):
        raise parse_error([parser.get_error(index) for index in range(parser.num_errors)], messages.errors())
    if network.num_inputs == 0 or network.num_outputs == 0:
        raise PlanError("parse", f"{request.onnx} is no model: {network.num_inputs} inputs, {network.num_outputs} outputs")
    return parser


def add_profiles(request: PlanRequest, builder: Any, network: Any, config: Any, messages: Messages) -> List[Any]:
    """Optimisation profiles of all dynamic inputs. Raises PlanError (`no_profile`). Returns them, to be kept until the build has ended."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = [tensor for tensor in inputs if -1 in _shape(tensor) or tensor.is_shape_tensor]
    unknown = {name for profile in request.profiles for name in profile} - {tensor.name for tensor in inputs}
    if unknown:
        raise PlanError("no_profile", f"profiles name {', '.join(sorted(unknown))}; the inputs are {', '.join(map(_described, inputs))}")
    if dynamic and not request.profiles:
        raise _no_profile(dynamic)
    kept = []
    for profile in request.profiles:
        missing = [tensor for tensor in dynamic if tensor.name not in profile]
        if missing:
            raise _no_profile(missing)
        made = _profile(builder, profile, inputs)
        if config.add_optimization_profile(made) < 0:
            raise build_error(messages.errors() or ["no optimization profile: TensorRT refused it"], "")
        kept.append(made)
    return kept


def _profile(builder: Any, profile: Profile, inputs: Sequence[Any]) -> Any:
    made = builder.create_optimization_profile()
    for tensor in inputs:
        if tensor.name not in profile:
            continue
        low, usual, high = profile[tensor.name]
        try:
            if tensor.is_shape_tensor:
                made.set_shape_input(tensor.name, low, usual, high)
                continue
            shape = _shape(tensor)
            if len(low) != len(shape) or any(size not in (-1, a) or (size != -1 and a != c) for size, a, c in zip(shape, low, high)):
                raise ValueError("it does not fit the graph")
            made.set_shape(tensor.name, low, usual, high)
        except (ValueError, TypeError, RuntimeError) as error:
            raise PlanError("no_profile", f"profile {low} {usual} {high} of {_described(tensor)}: {error}; correct it") from error
    return made


def set_precision(trt: Any, capabilities: Capabilities, request: PlanRequest, network: Any, config: Any) -> int:
    """Flags of the precision; returns how many layers are pinned to fp32. Raises PlanError."""
    if request.precision != "tf32":
        config.clear_flag(trt.BuilderFlag.TF32)
    else:
        config.set_flag(trt.BuilderFlag.TF32)
    if is_typed(request, capabilities) or not capabilities.has_precision_flags or request.precision in ("fp32", "tf32"):
        if request.fp32_layers:
            log.info("precision %s comes from the graph: fp32_layers say nothing here", request.precision)
        return 0
    config.set_flag(trt.BuilderFlag.FP16)
    if request.precision == "int8":
        if not any(layer.type == trt.LayerType.QUANTIZE for layer in _layers(network)):
            raise PlanError("failed", f"int8 needs ranges, and {request.onnx.name} has no QuantizeLinear: quantise the graph first")
        config.set_flag(trt.BuilderFlag.INT8)
    if not request.fp32_layers:
        return 0
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    pinned = [layer for layer in _layers(network) if matches(layer.name, request.fp32_layers) and _computes_floats(trt, layer)]
    for layer in pinned:
        layer.precision = trt.float32
        for index in range(layer.num_outputs):
            layer.set_output_type(index, trt.float32)
    if not pinned:
        log.warning("no layer has a name like %s: nothing is kept in fp32", ", ".join(request.fp32_layers))
    return len(pinned)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a layer comes from a node that a pattern names: the parser calls further layers of a node NAME_1, NAME_2…"""
    stem = name.rstrip("0123456789")
    node = stem[:-1] if stem != name and stem.endswith("_") else name
    return any(fnmatchcase(each, pattern) for each in (name, node) for pattern in patterns)


def use_accelerator(trt: Any, request: PlanRequest, builder: Any, network: Any, config: Any) -> Tuple[int, int]:
    """Prefer a DLA core, the GPU for the rest; (layers that can run there, layers). Raises PlanError (`unsupported`)."""
    cores = builder.num_DLA_cores
    if request.dla_core >= cores:
        raise PlanError(
            "unsupported", f"dla_core is {request.dla_core}, and TensorRT {trt.__version__} sees {cores} DLA cores here; use -1 for the GPU"
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = request.dla_core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    # Else the engine inspector tells names only, not where a layer runs.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    return sum(1 for layer in _layers(network) if config.can_run_on_DLA(layer)), network.num_layers


def _computes_floats(trt: Any, layer: Any) -> bool:
    if getattr(layer.type, "name", "") in _MOVES_DATA:
        return False
    outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
    return bool(outputs) and all(output.is_execution_tensor and output.dtype in (trt.float32, trt.float16) for output in outputs)


def _layers(network: Any) -> List[Any]:
    return [network.get_layer(index) for index in range(network.num_layers)]


def _shape(tensor: Any) -> Tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape)


def _described(tensor: Any) -> str:
    return f"{tensor.name} {list(_shape(tensor))}"


def _no_profile(tensors: Sequence[Any]) -> PlanError:
    return PlanError(
        "no_profile",
        f"no profile for the dynamic {', '.join(map(_described, tensors))}: give [[minimum], [usual], [maximum]] in each of `profiles`",
    )
