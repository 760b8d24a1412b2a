"""Device memory through NVIDIA's cuda-python, whose runtime API works in the primary context.

The module is `cuda.cudart` in versions 11 and 12.0 to 12.8, `cuda.bindings.runtime` since:
https://nvidia.github.io/cuda-python/cuda-bindings/latest/
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any, Callable, Dict, Tuple

import numpy as np

from models.engines import EngineError
from models.engines.device_memory import DeviceMemory, cuda_error

MODULES = ("cuda.bindings.runtime", "cuda.cudart")


def open_memory() -> DeviceMemory:
    """Raises ImportError when cuda-python is not installed, EngineError when it finds no device."""
    return CudaPythonMemory(_module())


def _module() -> Any:
    try:
        return importlib.import_module(MODULES[0])
    except ImportError:
        return importlib.import_module(MODULES[1])


class CudaPythonMemory:
    name = "cuda-python"
    can_capture = True

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._pinned: Dict[int, int] = {}
        self._call("cudaSetDevice", 0)
        self._call("cudaFree", 0)  # before version 12, setting the device alone makes no context
        attributes = runtime.cudaDeviceAttr
        wanted = (attributes.cudaDevAttrIntegrated, attributes.cudaDevAttrCanMapHostMemory)
        self.is_mapped = all(self._call("cudaDeviceGetAttribute", attribute, 0) for attribute in wanted)
        self._stream = self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def allocate(self, size: int) -> int:
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_host(self, size: int) -> Tuple[np.ndarray, int]:
        address = int(self._call("cudaHostAlloc", size, self._runtime.cudaHostAllocMapped if self.is_mapped else 0))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        self._pinned[array.ctypes.data] = address
        return array, int(self._call("cudaHostGetDevicePointer", address, 0)) if self.is_mapped else 0

    def free_host(self, array: np.ndarray) -> None:
        self._call("cudaFreeHost", self._pinned.pop(array.ctypes.data))

    def upload(self, target: int, source: np.ndarray) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, self._stream)

    def download(self, target: np.ndarray, source: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, self._stream)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, height, kind, self._stream)

    def zero(self, target: int, size: int) -> None:
        self._call("cudaMemsetAsync", target, 0, size, self._stream)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def free_bytes(self) -> int:
        return int(self._call("cudaMemGetInfo")[0])

    def capture(self, queue: Callable[[], None]) -> Any:
        # Thread-local: what other threads of the process do with CUDA meanwhile is their own business.
        self._call("cudaStreamBeginCapture", self._stream, self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            queue()
        except BaseException:
            self._runtime.cudaStreamEndCapture(self._stream)  # leaves the stream usable; its answer is that the capture failed
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            return self._call("cudaGraphInstantiateWithFlags", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self._stream)

    def forget(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        self._runtime.cudaStreamDestroy(self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Every function answers a tuple of its error and its results."""
        try:
            error, *results = getattr(self._runtime, name)(*arguments)
        except RuntimeError as failure:  # what versions up to 12 do where the driver's library is missing
            raise EngineError(f"CUDA: {name} cannot be called: {failure}") from failure
        if int(error):
            raise cuda_error(name, int(error), self._words(error))
        return results[0] if len(results) == 1 else tuple(results)

    def _words(self, error: Any) -> str:
        words = self._runtime.cudaGetErrorString(error)[1]
        return words.decode(errors="replace") if isinstance(words, bytes) else str(words)
