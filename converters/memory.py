"""Memory of a build, decided before anything is loaded."""

from __future__ import annotations

from converters.errors import ConversionError

MEBIBYTE = 1 << 20
# Interpreter, ONNX, runtime and a batch of pictures, measured with the smallest model.
FIXED_BYTES = 256 * MEBIBYTE
LEAST_WORKSPACE = 64 * MEBIBYTE
MOST_WORKSPACE = 4096 * MEBIBYTE


def needed_bytes(source_bytes: int, copies: float) -> int:
    """What a build takes at its peak: `copies` of its sources and what every build takes."""
    return int(source_bytes * copies) + FIXED_BYTES


def require_memory(name: str, source_bytes: int, copies: float, free_bytes: int | None) -> None:
    """Raises ConversionError (code `no_memory`) when the build would be killed half-way. `free_bytes` None: nobody knows."""
    needed = needed_bytes(source_bytes, copies)
    if free_bytes is not None and needed > free_bytes:
        raise ConversionError(
            f"building {name} needs about {needed // MEBIBYTE} MiB ({source_bytes // MEBIBYTE} MiB of files, {copies:g} times, and "
            f"{FIXED_BYTES // MEBIBYTE} MiB), but {free_bytes // MEBIBYTE} MiB are free; stop pipelines and other models, "
            "add swap, or take a smaller model",
            "no_memory",
        )


def workspace_bytes(free_bytes: int | None, share: float) -> int:
    """Workspace of TensorRT's builder, for the temporary memory of kernels while it times them: a share of what is free, for on a Jetson
    CPU and GPU have one memory."""
    if free_bytes is None:
        return LEAST_WORKSPACE
    return min(max(int(free_bytes * share), LEAST_WORKSPACE), MOST_WORKSPACE)
