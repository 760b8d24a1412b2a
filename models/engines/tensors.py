"""Checks of what goes into an engine, with messages that name the tensor and the remedy."""

from __future__ import annotations

from typing import Dict, Mapping, Sequence, Tuple

import numpy as np

from models.engines import EngineError, TensorSpec


def check_inputs(specs: Sequence[TensorSpec], inputs: Mapping[str, np.ndarray], artefact: str) -> Dict[str, np.ndarray]:
    """The inputs, contiguous, after they were found to match `specs`. Raises EngineError."""
    known = {spec.name: spec for spec in specs}
    for name in inputs:
        if name not in known:
            raise EngineError(f"{artefact} has no input {name!r}; its inputs are {', '.join(known)}")
    checked: Dict[str, np.ndarray] = {}
    for name, spec in known.items():
        if name not in inputs:
            raise EngineError(f"{artefact}: input {name!r} {spec.dtype}{_text(spec.shape)} is missing")
        array = np.asarray(inputs[name])
        if array.dtype.name != spec.dtype:
            raise EngineError(f"{artefact}: input {name!r} is {array.dtype.name}, the model takes {spec.dtype}; convert it")
        if not _fits(array.shape, spec.shape):
            raise EngineError(f"{artefact}: input {name!r} has shape {_text(array.shape)}, the model takes {_text(spec.shape)}")
        checked[name] = array if array.flags.c_contiguous else np.ascontiguousarray(array)
    return checked


def _fits(shape: Tuple[int, ...], wanted: Tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, have) for have, want in zip(shape, wanted))


def _text(shape: Tuple[int, ...]) -> str:
    return "[" + ", ".join("?" if size < 0 else str(size) for size in shape) + "]"
