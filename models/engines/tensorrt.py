"""Plans of TensorRT."""

from __future__ import annotations

from pathlib import Path

from models.engines import Engine, EngineError, EngineOptions, GenerationEngine

ARTEFACT = "model.plan"


def open_engine(folder: Path, options: EngineOptions) -> Engine:
    """Open `folder`/model.plan. Raises EngineError."""
    raise EngineError(f"{folder / ARTEFACT}: this build of hotspare cannot run plans yet; convert the model for onnxruntime")


def open_generation_engine(folder: Path, options: EngineOptions) -> GenerationEngine:
    """Open a converted decoder. Raises EngineError."""
    raise EngineError(f"{folder / ARTEFACT}: this build of hotspare cannot run plans yet; convert the model for onnxruntime")
