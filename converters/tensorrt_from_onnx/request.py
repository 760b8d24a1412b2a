"""What one plan is built from and how: a JSON object on the standard input of the process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

from converters.tensorrt_from_onnx.errors import PlanError

MAX_BYTES = 1 << 20
MODULES = ("tensorrt", "tensorrt_rtx")
PRECISIONS = ("fp32", "tf32", "fp16", "int8", "typed")
MAX_PROFILES = 16
MAX_RANK = 8

# Sizes, or the values of a shape tensor: smallest, most usual, largest.
Range = Tuple[Tuple[int, ...], Tuple[int, ...], Tuple[int, ...]]
Profile = Dict[str, Range]


@dataclass(frozen=True)
class PlanRequest:
    """module: `tensorrt` builds for the GPU at hand, `tensorrt_rtx` for desktop GPUs and without one.

    onnx, plan       the graph, and the file that the plan becomes
    profiles         one or more maps of input → (minimum, optimum, maximum); only dynamic inputs need a place in them
    precision        `fp32` (TF32 off), `tf32`; `typed`: as the ONNX graph says (TensorRT ≥ 10 and RTX); `fp16`, `int8`: TensorRT chooses
                     among these and fp32 (TensorRT 8 and 10; int8 needs Q/DQ nodes in the graph)
    fp32_layers      with `fp16` and `int8`: patterns (fnmatch) of the names of nodes that stay in fp32
    workspace_bytes  most that one layer may use for scratch
    timing_cache     file of measured kernels, shared by builds; None for none
    dla_core         core of the deep-learning accelerator, -1 for none; what it cannot run stays on the GPU
    """

    module: str
    onnx: Path
    plan: Path
    profiles: Tuple[Profile, ...] = ()
    precision: str = "fp32"
    fp32_layers: Tuple[str, ...] = ()
    workspace_bytes: int = 1 << 30
    timing_cache: Optional[Path] = None
    dla_core: int = -1
    optimization_level: int = 3
    version_compatible: bool = False
    hardware_compatible: bool = False


_REQUIRED = frozenset(("module", "onnx", "plan"))
_INTEGERS = {"workspace_bytes": (1, 1 << 44), "dla_core": (-1, 3), "optimization_level": (0, 5)}
_WORDS = {"module": MODULES, "precision": PRECISIONS}
_SWITCHES = ("version_compatible", "hardware_compatible")


def parse_request(text: bytes) -> PlanRequest:
    """Raises PlanError (code `bad_request`)."""
    if len(text) > MAX_BYTES:
        raise _bad(f"the request has more than {MAX_BYTES} bytes")
    try:
        values = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise _bad(f"the request is not JSON: {error}") from error
    known = set(PlanRequest.__dataclass_fields__)
    if not isinstance(values, dict) or set(values) - known or _REQUIRED - set(values):
        raise _bad(f"the request must be an object with {', '.join(sorted(_REQUIRED))} and may have {', '.join(sorted(known - _REQUIRED))}")
    fields: Dict[str, Any] = {name: _plain(name, value) for name, value in values.items()}
    request = PlanRequest(**fields)
    if not request.onnx.is_file():
        raise _bad(f"onnx: {request.onnx} is no file")
    if not request.plan.parent.is_dir():
        raise _bad(f"plan: {request.plan.parent} is no folder; make it first")
    return request


def _plain(name: str, value: Any) -> Any:
    if name in _WORDS:
        return _word(name, value)
    if name in _INTEGERS:
        return _integer(name, value, *_INTEGERS[name])
    if name in _SWITCHES:
        if not isinstance(value, bool):
            raise _bad(f"{name} is {value!r}, must be true or false")
        return value
    if name == "profiles":
        return _profiles(value)
    if name == "fp32_layers":
        if not isinstance(value, list) or not all(isinstance(pattern, str) and pattern for pattern in value):
            raise _bad(f"{name} must be a list of patterns")
        return tuple(value)
    return None if name == "timing_cache" and value is None else _path(name, value)


def _word(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in _WORDS[name]:
        raise _bad(f"{name} is {value!r}, must be one of {', '.join(_WORDS[name])}")
    return value


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _bad(f"{name} is {value!r}, must be an integer from {low} to {high}")
    return value


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise _bad(f"{name} is {value!r}, must be an absolute path")
    return Path(value)


def _profiles(values: Any) -> Tuple[Profile, ...]:
    if not isinstance(values, list) or len(values) > MAX_PROFILES or not all(isinstance(value, Mapping) for value in values):
        raise _bad(f"profiles must be a list of at most {MAX_PROFILES} objects")
    return tuple({name: _range(f"profiles[{at}].{name}", value) for name, value in profile.items()} for at, profile in enumerate(values))


def _range(name: str, value: Any) -> Range:
    wrong = _bad(f"{name} is {str(value)[:100]}, must be [[minimum…], [optimum…], [maximum…]]: equally long and ascending integers")
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(sizes, list) and len(sizes) <= MAX_RANK for sizes in value):
        raise wrong
    if not all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 31 for sizes in value for size in sizes):
        raise wrong
    low, usual, high = (tuple(sizes) for sizes in value)
    if not len(low) == len(usual) == len(high) or not all(a <= b <= c for a, b, c in zip(low, usual, high)):
        raise wrong
    return low, usual, high


def _bad(message: str) -> PlanError:
    return PlanError("bad_request", message)
