"""Plans of TensorRT as engines: stateless ones here, decoders in `tensorrt_generation.py`.

Whatever talks to CUDA belongs to the thread that opened the engine.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any, Dict, Mapping, Tuple

import numpy as np

from models.device import probe_device
from models.engines import DeviceLost, EngineError, EngineOptions, GenerationEngine
from models.engines.device_memory import DeviceMemory, open_device_memory
from models.engines.tensor_buffer import TensorBuffer
from models.engines.tensorrt_execution import Execution
from models.engines.tensorrt_generation import open_generation
from models.engines.tensorrt_plan import Plan, open_plan
from models.engines.tensors import check_inputs, fitted

log = logging.getLogger(__name__)


def open_engine(folder: Path, options: EngineOptions) -> TensorRtEngine:
    """Open `folder`/model.plan. Raises EngineError."""
    plan, memory = _open(folder, options)
    try:
        return TensorRtEngine(plan, memory, options.cuda_graph)
    except BaseException:
        memory.close()
        raise


def open_generation_engine(folder: Path, options: EngineOptions) -> GenerationEngine:
    """Open a converted decoder (model.plan, generation.json) with its KV cache on the device. Raises EngineError."""
    plan, memory = _open(folder, options)
    try:
        return open_generation(folder, plan, memory, options)
    except BaseException:
        memory.close()
        raise


def _open(folder: Path, options: EngineOptions) -> Tuple[Plan, DeviceMemory]:
    plan = open_plan(folder, options, probe_device())
    return plan, open_device_memory(options.memory)


class TensorRtEngine:
    """A stateless model. Inputs are copied into memory that the device reads, in place on an integrated GPU; integers of another width
    than the plan's are taken when their values fit, since TensorRT 8 makes int32 of every int64."""

    provider = "tensorrt"

    def __init__(self, plan: Plan, memory: DeviceMemory, captures: bool) -> None:
        self.inputs = plan.inputs
        self.outputs = plan.outputs
        self._plan = plan
        self._memory = memory
        self._thread = threading.get_ident()
        self._execution = Execution(plan, memory, captures)
        self._buffers = {spec.name: TensorBuffer(memory) for spec in (*plan.inputs, *plan.outputs)}
        self._sizes: Dict[str, int] = {}
        self._allocators: Dict[str, Any] = {}
        self._is_open = True

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        self._check_usable()
        checked = check_inputs(self.inputs, fitted(self.inputs, inputs, self._plan.artefact), self._plan.artefact)
        self._execution.reshape({name: array.shape for name, array in checked.items()})
        for name, array in checked.items():
            self._fill(name, array)
        self._execution.bind({name: self._address(name) for name in checked})
        self._execution.infer_shapes()
        shapes = {spec.name: self._execution.shape(spec.name) for spec in self.outputs}
        self._provide(shapes)
        try:
            self._execution.run(self._upload, self._download)
        finally:
            # Also after a failure: what was queued reads and writes our memory.
            self._memory.synchronize()
        shapes.update({name: self._allocators[name].shape for name in shapes if name in self._allocators})
        self._download_allocated()
        return {spec.name: self._buffers[spec.name].view(spec.dtype, shapes[spec.name]) for spec in self.outputs}

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        try:
            self._execution.close()
            for buffer in self._buffers.values():
                buffer.close()
            self._memory.close()
        except (EngineError, DeviceLost) as error:
            log.warning("%s could not be closed: %s", self._plan.artefact, error)

    def _check_usable(self) -> None:
        if not self._is_open:
            raise EngineError(f"{self._plan.artefact} was closed; open it again")
        if threading.get_ident() != self._thread:
            raise EngineError(f"{self._plan.artefact} belongs to the thread that opened it; open it in the thread that runs it")

    def _fill(self, name: str, array: np.ndarray) -> None:
        buffer = self._buffers[name]
        buffer.grow(array.nbytes)
        np.copyto(buffer.view(array.dtype.name, array.shape), array)
        self._sizes[name] = array.nbytes

    def _address(self, name: str) -> int:
        return self._buffers[name].host_address if name in self._plan.host_inputs else self._buffers[name].address

    def _provide(self, shapes: Mapping[str, Tuple[int, ...]]) -> None:
        """Memory for outputs: as much as their shapes say, or on demand where those depend on data."""
        for spec in self.outputs:
            shape = shapes[spec.name]
            if min(shape, default=0) >= 0 and spec.name not in self._allocators:
                self._sizes[spec.name] = np.dtype(spec.dtype).itemsize * int(np.prod(shape, dtype=np.int64))
                self._buffers[spec.name].grow(self._sizes[spec.name])
                self._execution.bind({spec.name: self._buffers[spec.name].address})
            elif spec.name not in self._allocators:
                self._allocators[spec.name] = _allocator(self._plan.module, self._buffers[spec.name])
                self._execution.allocate_with(spec.name, self._allocators[spec.name])

    def _upload(self) -> None:
        for spec in self.inputs:
            if spec.name not in self._plan.host_inputs:
                self._buffers[spec.name].upload(self._sizes[spec.name])

    def _download(self) -> None:
        for spec in self.outputs:
            if spec.name not in self._allocators:
                self._buffers[spec.name].download(self._sizes[spec.name])

    def _download_allocated(self) -> None:
        """What the device wrote into memory that was allocated meanwhile."""
        for spec in self.outputs:
            if spec.name in self._allocators:
                shape = self._allocators[spec.name].shape
                self._buffers[spec.name].download(np.dtype(spec.dtype).itemsize * int(np.prod(shape, dtype=np.int64)))
        if self._allocators:
            self._memory.synchronize()


def _allocator(module: Any, buffer: TensorBuffer) -> Any:
    """An IOutputAllocator that grows `buffer`; `shape` is that of the last run."""

    class OutputAllocator(module.IOutputAllocator):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            module.IOutputAllocator.__init__(self)
            self.shape: Tuple[int, ...] = ()

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            try:
                buffer.grow(size)
            except (EngineError, DeviceLost) as error:  # nothing may be raised through TensorRT; 0 is its sign of failure
                log.warning("%s: %d bytes cannot be allocated: %s", tensor_name, size, error)
                return 0
            return buffer.address

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(shape)

    return OutputAllocator()
