"""Inputs and outputs of an ONNX Runtime session in memory of our own, bound once for each shape.

`session.run` allocates and copies both sides anew each time: on a GPU the inputs then go through pageable memory that the provider has to
stage. Here they are copied into device memory that stays, and outputs of known shape come into arrays that stay.

API: https://onnxruntime.ai/docs/api/python/api_summary.html#iobinding
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Dict, Mapping, Sequence, Tuple

import numpy as np
import onnxruntime

from models.engines import TensorSpec

# Texts come in many lengths; the shape that was not used for longest is bound anew.
SHAPES_KEPT = 16

Key = Tuple[Tuple[int, ...], ...]


class Bindings:
    """For one session, whose inputs lie in the memory of `device` (`cuda` or `cpu`). Arrays that `run` returns are valid until the next."""

    def __init__(self, session: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], device: str) -> None:
        self._session = session
        self._inputs, self._outputs, self._device = inputs, outputs, device
        self._bound: "OrderedDict[Key, _Bound]" = OrderedDict()

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """`inputs` contiguous and of the types that the session takes. Raises what ONNX Runtime raises."""
        key = tuple(inputs[spec.name].shape for spec in self._inputs)
        bound = self._bound.get(key)
        if bound is None:
            if len(self._bound) >= SHAPES_KEPT:
                self._bound.popitem(last=False)
            bound = self._bound[key] = _Bound(self._session, inputs, self._outputs, self._device)
        self._bound.move_to_end(key)
        return bound.run(self._session, inputs)


class _Bound:
    def __init__(self, session: Any, inputs: Mapping[str, np.ndarray], outputs: Sequence[TensorSpec], device: str) -> None:
        self._binding = session.io_binding()
        self._values: Dict[str, Any] = {}
        for name, array in inputs.items():
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, device, 0)
            self._values[name] = value
            self._binding.bind_ortvalue_input(name, value)
        self._arrays: Dict[str, np.ndarray] = {}
        self._names = [spec.name for spec in outputs]
        self._open = [spec.name for spec in outputs if min(spec.shape, default=0) < 0]
        for spec in outputs:
            if spec.name not in self._open:
                array = self._arrays[spec.name] = np.empty(spec.shape, spec.dtype)
                self._binding.bind_output(spec.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self, session: Any, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        for name, array in inputs.items():
            self._values[name].update_inplace(array)
        for name in self._open:  # anew each time: what the last run left there has that run's shape
            self._binding.bind_output(name, "cpu")
        self._binding.synchronize_inputs()
        session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        if not self._open:
            return dict(self._arrays)
        # The binding's order is that of the first calls of `bind_output`.
        found = dict(zip((*self._arrays, *self._open), self._binding.get_outputs()))
        return {name: self._arrays[name] if name in self._arrays else found[name].numpy() for name in self._names}
