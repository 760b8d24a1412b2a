"""A TensorRT plan, built by a child under the interpreter that has TensorRT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.decoder_graph import Progress
from converters.engine_process import end_child, start_child
from converters.errors import ConversionError
from converters.tensorrt_from_onnx import VERSION
from models.manifest import Build

MODULE = "converters.tensorrt_from_onnx"


def build_plan(python: Path, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """`request` as in `converters/tensorrt_from_onnx/request.py`; returns the `result`. Raises ConversionError with the child's code.

    However this ends, the child has ended too.
    """
    try:
        child = start_child(python, MODULE)
    except OSError as error:
        raise ConversionError(f"{python} cannot be started: {error}; name the interpreter that has TensorRT", "bad_request") from error
    outcome: dict[str, Any] = {}
    try:
        if child.stdin is None or child.stdout is None:
            raise ConversionError("the plan's process has no pipes", "failed")
        try:
            child.stdin.write(json.dumps(request).encode())
            child.stdin.close()
        except BrokenPipeError:
            pass  # it died at once: its status is told below
        for line in child.stdout:
            value = json.loads(line)
            if "phase" not in value:
                outcome = value
                break
            progress(float(value["fraction"]), f"{value['phase']}: {value['message']}")
    except BaseException:
        child.kill()
        raise
    finally:
        end_child(child)
    if "result" in outcome:
        return dict(outcome["result"])
    if "error" in outcome:
        raise _failure(outcome["error"])
    # Status -9 without a word is, nearly always, the kernel's answer to want of memory.
    code = "no_memory" if child.returncode == -9 else "failed"
    raise ConversionError(
        f"the process that built the plan ended with status {child.returncode}; its log says why. Where memory is short, "
        "stop pipelines and other models, or add swap",
        code,
    )


def wishes(build: Build) -> dict[str, Any]:
    """Fields of a request that a manifest decides, the same for every line."""
    names = ("dla_core", "optimization_level", "version_compatible", "hardware_compatible")
    return {name: getattr(build, name) for name in names}


def converter() -> str:
    """For the engine key."""
    return f"tensorrt_from_onnx/{VERSION}"


def _failure(told: Mapping[str, Any]) -> ConversionError:
    is_named = not told.get("node") or str(told["node"]) in str(told["message"])
    place = "" if is_named else f" (node {told['node']}, operator {told['operator']})"
    return ConversionError(f"TensorRT: {told['message']}{place}", str(told["code"]))
