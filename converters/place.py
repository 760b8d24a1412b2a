"""Asks what will run an engine: a module, its version, and the device."""

from __future__ import annotations

import subprocess
from pathlib import Path

import onnxruntime

from converters.engine_process import end_child, start_child
from converters.errors import ConversionError
from converters.ladder import Place
from converters.native_from_causal_model import compiler_version
from converters.request import BuildOptions
from models.engines.native.weights import cpu_identity
from models.engines.onnx_providers import PROVIDERS
from models.record import RecordError
from models.runtimes import Runtimes, parse_runtimes

# The first import of TensorRT from a cold SD card takes half of that.
DEADLINE_S = 60.0


def place_of(options: BuildOptions) -> Place:
    """Raises ConversionError (code `unsupported`) where the target is not to be had."""
    if options.provider != "cpu":
        return _provider_place(options)
    if options.target == "onnxruntime":
        return Place("onnxruntime", onnxruntime.__version__)
    if options.target == "native":
        return Place("native", compiler_version(), device=cpu_identity())
    runtimes = ask_runtimes(options.python)
    module = getattr(runtimes, options.target)
    if module is None:
        why = runtimes.problems.get(options.target) or "it is not installed there"
        raise ConversionError(f"the target is {options.target}, but {options.python} cannot load it: {why}", "unsupported")
    device = runtimes.device
    return Place(
        options.target,
        module.version,
        device=device.key,
        sm=int(device.sm) if device.sm.isdigit() else 0,
        l4t=device.l4t,
        can_run_here=device.kind == "cuda",
        reason=device.reason,
    )


def _provider_place(options: BuildOptions) -> Place:
    """A provider that uses a GPU: it is the worker's ONNX Runtime that has it, not ours."""
    if options.target != "onnxruntime":
        raise ConversionError(f"provider {options.provider!r} is one of ONNX Runtime, the target is {options.target}", "bad_request")
    runtimes = ask_runtimes(options.python)
    found, device, wanted = runtimes.onnxruntime, runtimes.device, PROVIDERS[options.provider][0]
    if found is None or wanted not in found.providers:
        has = f"has {', '.join(found.providers)}" if found else runtimes.problems.get("onnxruntime", "is not installed")
        raise ConversionError(
            f"provider {options.provider!r} needs {wanted}; ONNX Runtime of {options.python} {has}: install onnxruntime-gpu there, "
            "or set worker.provider to cpu",
            "unsupported",
        )
    return Place(
        "onnxruntime",
        found.version,
        device=device.key,
        sm=int(device.sm) if device.sm.isdigit() else 0,
        l4t=device.l4t,
        can_run_here=device.kind == "cuda",
        reason=device.reason,
        provider=options.provider,
        tensorrt=found.tensorrt if options.provider == "tensorrt" else "",
    )


def ask_runtimes(python: Path) -> Runtimes:
    """What an interpreter can run models with. Raises ConversionError (code `bad_request`) for one that does not answer."""
    try:
        child = start_child(python, "models.runtimes")
    except OSError as error:
        raise ConversionError(f"{python} cannot be started: {error}; name the interpreter of the worker", "bad_request") from error
    try:
        answer, _ = child.communicate(timeout=DEADLINE_S)
        return parse_runtimes(answer)
    except (subprocess.TimeoutExpired, RecordError) as error:
        raise ConversionError(f"{python} does not say which runtimes it has: {error}; its log says why", "bad_request") from error
    finally:
        child.kill()
        end_child(child)
