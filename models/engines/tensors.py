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


def fitted(specs: Sequence[TensorSpec], inputs: Mapping[str, np.ndarray], artefact: str) -> Dict[str, np.ndarray]:
    """The inputs with int32 and int64 exchanged where an engine asks for the other one. Raises EngineError for values that do not fit."""
    wanted = {spec.name: spec.dtype for spec in specs}
    return {name: _fit(name, np.asarray(array), wanted.get(name, ""), artefact) for name, array in inputs.items()}


def _fit(name: str, array: np.ndarray, dtype: str, artefact: str) -> np.ndarray:
    if (array.dtype.name, dtype) == ("int64", "int32") and array.size:
        limits = np.iinfo(np.int32)
        least, largest = int(array.min()), int(array.max())
        if least < limits.min or largest > limits.max:
            raise EngineError(f"{artefact}: input {name!r} has values from {least} to {largest}, the engine takes int32")
    integers = ("int32", "int64")
    return array.astype(dtype, copy=False) if dtype in integers and array.dtype.name in integers else array


def _fits(shape: Tuple[int, ...], wanted: Tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, have) for have, want in zip(shape, wanted))


def _text(shape: Tuple[int, ...]) -> str:
    return "[" + ", ".join("?" if size < 0 else str(size) for size in shape) + "]"
