"""Device memory through pycuda: https://documen.tician.de/pycuda/driver.html

Its `autoinit` makes a context of its own that belongs to one thread and ends in aborts; the primary context is retained instead, and
pushed while we call into it. pycuda has no CUDA graphs.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, Callable, Dict, Tuple

import numpy as np

from models.engines import EngineError
from models.engines.device_memory import DeviceMemory, cuda_error

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which has no name in pycuda
CODES = {"out of memory": 2, "illegal memory": 700, "unspecified launch": 719, "misaligned": 716, "timed out": 702}


def open_memory() -> DeviceMemory:
    """Raises ImportError when pycuda is not installed, EngineError when it finds no device."""
    return PycudaMemory(importlib.import_module("pycuda.driver"))


class PycudaMemory:
    name = "pycuda"
    can_capture = False

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._device: Dict[int, Any] = {}
        self._host: Dict[int, np.ndarray] = {}
        self._call("init")
        device = self._guard("Device", lambda: driver.Device(0))
        self._context = self._guard("retain_primary_context", device.retain_primary_context)
        # One thread owns the context from here to `close`, so it stays pushed.
        self._guard("push", self._context.push)
        attribute = driver.device_attribute
        self.is_mapped = all(bool(device.get_attribute(each)) for each in (attribute.INTEGRATED, attribute.CAN_MAP_HOST_MEMORY))
        self._stream = self._guard("Stream", lambda: driver.Stream(NON_BLOCKING))
        self.stream = int(self._stream.handle)

    def allocate(self, size: int) -> int:
        allocation = self._call("mem_alloc", size)
        self._device[int(allocation)] = allocation
        return int(allocation)

    def free(self, address: int) -> None:
        self._guard("free", self._device.pop(address).free)

    def allocate_host(self, size: int) -> Tuple[np.ndarray, int]:
        flags = self._driver.host_alloc_flags.DEVICEMAP if self.is_mapped else 0
        array: np.ndarray = self._call("pagelocked_empty", (size,), np.uint8, "C", flags)
        self._host[array.ctypes.data] = array
        return array, int(array.base.get_device_pointer()) if self.is_mapped else 0  # type: ignore[union-attr]  # pycuda's allocation

    def free_host(self, array: np.ndarray) -> None:
        self._guard("free", self._host.pop(array.ctypes.data).base.free)  # type: ignore[union-attr]  # pycuda's allocation

    def upload(self, target: int, source: np.ndarray) -> None:
        self._call("memcpy_htod_async", target, source, self._stream)

    def download(self, target: np.ndarray, source: int) -> None:
        self._call("memcpy_dtoh_async", target, source, self._stream)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        copy = self._driver.Memcpy2D()
        copy.set_src_device(source)
        copy.set_dst_device(target)
        copy.src_pitch, copy.dst_pitch, copy.width_in_bytes, copy.height = source_pitch, target_pitch, width, height
        self._guard("Memcpy2D", lambda: copy(self._stream))

    def zero(self, target: int, size: int) -> None:
        self._call("memset_d8_async", target, 0, size, self._stream)

    def synchronize(self) -> None:
        self._guard("synchronize", self._stream.synchronize)

    def free_bytes(self) -> int:
        return int(self._call("mem_get_info")[0])

    def capture(self, queue: Callable[[], None]) -> Any:
        raise EngineError("pycuda has no CUDA graphs; install cuda-python for them")

    def launch(self, graph: Any) -> None:
        raise EngineError("pycuda has no CUDA graphs; install cuda-python for them")

    def forget(self, graph: Any) -> None:
        """There is none."""

    def close(self) -> None:
        del self._stream
        self._context.pop()
        self._context.detach()

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._guard(name, lambda: getattr(self._driver, name)(*arguments))

    def _guard(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except self._driver.Error as error:
            words = str(error)
            code = next((code for text, code in CODES.items() if re.search(text, words)), 1)
            raise cuda_error(name, code, words) from error
