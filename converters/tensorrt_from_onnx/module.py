"""The TensorRT at hand: which module, what it can do, and whether it may be touched. The only file that knows versions apart."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

from converters.tensorrt_from_onnx.errors import PlanError
from models.device import probe_device


@dataclass(frozen=True)
class Capabilities:
    """What a version has beyond the part of the API that all from 8.5 to 11 and RTX share (asked of the module, not of its number).

    needs_explicit_batch   8.5, 8.6; later ones ignore the flag or have dropped it
    has_typed_networks     from 9 on: types as in the ONNX graph
    has_precision_flags    up to 10: FP16, INT8, precisions per layer
    has_progress           from 9 on: IProgressMonitor
    has_timing_cache       all but RTX, where it does nothing
    has_level              from 8.6 on: builder_optimization_level
    has_version_compatible, has_hardware_compatible   from 8.6 on
    """

    name: str
    version: str
    needs_explicit_batch: bool
    has_typed_networks: bool
    has_precision_flags: bool
    has_progress: bool
    has_timing_cache: bool
    has_level: bool
    has_version_compatible: bool
    has_hardware_compatible: bool


def load_module(name: str) -> Any:
    """Module `tensorrt` or `tensorrt_rtx`. Raises PlanError (`unsupported`) where this interpreter has none."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise PlanError(
            "unsupported",
            f"{sys.executable} cannot import {name}: {error}; on a Jetson install python3-libnvinfer and let worker.python "
            "name the system's interpreter",
        ) from error


def capabilities_of(trt: Any) -> Capabilities:
    is_rtx = trt.__name__.startswith("tensorrt_rtx")
    return Capabilities(
        name=f"TensorRT{'-RTX' if is_rtx else ''} {trt.__version__}",
        version=str(trt.__version__),
        needs_explicit_batch=not hasattr(trt, "IProgressMonitor") and hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"),
        has_typed_networks=hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"),
        has_precision_flags=hasattr(trt.BuilderFlag, "FP16"),
        has_progress=hasattr(trt, "IProgressMonitor"),
        has_timing_cache=not is_rtx,
        has_level=hasattr(trt.IBuilderConfig, "builder_optimization_level"),
        has_version_compatible=hasattr(trt.BuilderFlag, "VERSION_COMPATIBLE"),
        # RTX's plans are portable from Ampere on without it, and it refuses the field.
        has_hardware_compatible=hasattr(trt.IBuilderConfig, "hardware_compatibility_level") and not is_rtx,
    )


def open_builder(trt: Any, logger: Any) -> Any:
    """A Builder, never tried before the driver has answered: without one some versions crash. Raises PlanError (`no_device`)."""
    is_rtx = trt.__name__.startswith("tensorrt_rtx")
    device = probe_device()
    if device.kind != "cuda" and not is_rtx:
        raise PlanError(
            "no_device",
            f"there is no GPU here ({device.reason}), and a plan is built on the GPU that will run it: check the driver and the "
            "rights on its devices",
        )
    try:
        return trt.Builder(logger)
    except TypeError as error:  # pybind's word for a null pointer
        raise PlanError(
            "no_device",
            f"TensorRT {trt.__version__} cannot start here ({error}): its CUDA must fit the driver's; see the log for its reason",
        ) from error
