"""What an interpreter can run models with: `python -m models.runtimes` prints it as one JSON object.

The daemon asks the workers' interpreter this once. Nothing of TensorRT is constructed here: without a driver its Builder and its Runtime
may end the process.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Optional, Tuple

from models.device import Device, probe_device
from models.engines.onnx_providers import TENSORRT, library_version
from models.record import RecordError, from_mapping, to_mapping

MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class OnnxRuntime:
    """`providers` are those compiled in; whether one works shows only when a session is opened. `tensorrt`: version of the TensorRT behind
    the provider of that name, as far as its library tells."""

    version: str
    providers: Tuple[str, ...]
    tensorrt: str = ""


@dataclass(frozen=True)
class TensorRT:
    version: str


@dataclass(frozen=True)
class Runtimes:
    """What can be imported, None where it cannot; `problems` says by module what stood in the way of one that is installed."""

    python: str
    device: Device
    onnxruntime: Optional[OnnxRuntime] = None
    tensorrt: Optional[TensorRT] = None
    tensorrt_rtx: Optional[TensorRT] = None
    problems: Dict[str, str] = field(default_factory=dict)


def find_runtimes(
    load: Callable[[str], Any] = importlib.import_module,
    probe: Callable[[], Device] = probe_device,
    tensorrt_version: Callable[[], str] = library_version,
) -> Runtimes:
    """Import what is there. Takes a second or two, and hundreds of MB of address space: call it in a process of its own."""
    problems: Dict[str, str] = {}
    found: Dict[str, Any] = {}
    for name in ("onnxruntime", "tensorrt", "tensorrt_rtx"):
        try:
            found[name] = load(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                problems[name] = f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001  # a vendor's module may fail in any way; that is what is to be told
            problems[name] = f"{type(error).__name__}: {error}"
    onnx = found.get("onnxruntime")
    return Runtimes(
        python=platform.python_version(),
        device=probe(),
        onnxruntime=_onnxruntime(onnx, tensorrt_version) if onnx else None,
        tensorrt=TensorRT(found["tensorrt"].__version__) if "tensorrt" in found else None,
        tensorrt_rtx=TensorRT(found["tensorrt_rtx"].__version__) if "tensorrt_rtx" in found else None,
        problems=problems,
    )


def _onnxruntime(module: Any, tensorrt_version: Callable[[], str]) -> OnnxRuntime:
    providers = tuple(module.get_available_providers())
    return OnnxRuntime(module.__version__, providers, tensorrt_version() if TENSORRT in providers else "")


def parse_runtimes(output: bytes) -> Runtimes:
    """What `python -m models.runtimes` printed. Raises RecordError."""
    if len(output) > MAX_BYTES:
        raise RecordError(f"Runtimes: {len(output)} bytes are no answer of models.runtimes")
    try:
        values = json.loads(output.decode())
    except ValueError as error:
        raise RecordError(f"Runtimes: models.runtimes printed no JSON ({error}): {output[:200]!r}") from error
    return from_mapping(Runtimes, values)


def main() -> None:
    # Banners that libraries write to file descriptor 1 go to standard error, so that the answer stands alone.
    answer = os.dup(1)
    os.dup2(2, 1)
    text = json.dumps(to_mapping(find_runtimes()))
    sys.stdout.flush()
    with os.fdopen(answer, "w") as stream:
        stream.write(f"{text}\n")


if __name__ == "__main__":
    main()
