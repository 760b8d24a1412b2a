"""CUDA as far as engines need it: one stream in the primary context, memory on both sides, copies, graphs.

Two packages reach it, each behind the same small interface. The primary context is shared with TensorRT and needs no stack of contexts.
"""

from __future__ import annotations

import importlib
from typing import Any, Callable, Dict, Protocol, Tuple

import numpy as np

from models.engines import DeviceLost, EngineError

# Errors after which the context answers nothing else any more: https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html
LOST = frozenset((214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999))

BACK_ENDS: Dict[str, str] = {
    "cuda-python": "models.engines.cuda_python",
    "pycuda": "models.engines.pycuda_driver",
}


class DeviceMemory(Protocol):
    """A stream and the memory it works on; it belongs to the thread that opened it.

    Device addresses are integers. Copies, fills and launches are queued on the stream and read or write host memory when the stream comes
    to them: nobody may touch that memory before `synchronize`. Every call raises EngineError, and DeviceLost when the context is gone.

    is_mapped    host memory of `allocate_host` has a device address too (integrated GPUs), so nothing needs to be copied
    can_capture  the package offers CUDA graphs
    stream       handle of the stream, as TensorRT takes it
    """

    name: str
    is_mapped: bool
    can_capture: bool
    stream: int

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of device memory, at least 256-byte aligned."""
        ...

    def free(self, address: int) -> None: ...

    def allocate_host(self, size: int) -> Tuple[np.ndarray, int]:
        """Page-locked uint8 [size] and its device address, 0 unless `is_mapped`."""
        ...

    def free_host(self, array: np.ndarray) -> None:
        """Give back what `allocate_host` returned; views of it must not be used any more."""
        ...

    def upload(self, target: int, source: np.ndarray) -> None:
        """Queue a copy of the contiguous, page-locked `source` to the device."""
        ...

    def download(self, target: np.ndarray, source: int) -> None:
        """Queue a copy from the device into the contiguous, page-locked `target`."""
        ...

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """Queue a copy on the device of `height` rows of `width` bytes that lie `pitch` bytes apart."""
        ...

    def zero(self, target: int, size: int) -> None: ...

    def synchronize(self) -> None:
        """Wait until everything queued is done."""
        ...

    def free_bytes(self) -> int:
        """Device memory that is free now."""
        ...

    def capture(self, queue: Callable[[], None]) -> Any:
        """A graph of what `queue` queues, which is not done now."""
        ...

    def launch(self, graph: Any) -> None: ...

    def forget(self, graph: Any) -> None: ...

    def close(self) -> None:
        """Give the stream back; never raises. All memory must have been freed before."""
        ...


def open_device_memory(choice: str) -> DeviceMemory:
    """The memory of the first device through the package `choice`, or the first of BACK_ENDS that is installed. Raises EngineError."""
    if choice != "auto" and choice not in BACK_ENDS:
        raise EngineError(f"unknown package {choice!r} for device memory; known are auto, {', '.join(BACK_ENDS)}")
    missing = []
    for name in BACK_ENDS if choice == "auto" else (choice,):
        try:
            memory: DeviceMemory = importlib.import_module(BACK_ENDS[name]).open_memory()
        except ImportError as error:
            missing.append(f"{name} ({error})")
        else:
            return memory
    raise EngineError(f"device memory cannot be reached: {'; '.join(missing)}; install cuda-python or pycuda for this interpreter")


def cuda_error(call: str, code: int, words: str) -> BaseException:
    """What to raise when `call` answered with the error `code`."""
    if code in LOST:
        return DeviceLost(f"CUDA: {call} failed with error {code} ({words}); the context of this process is lost: start it again")
    remedy = "; free memory, or ask for fewer slots or context_tokens" if code == 2 else ""
    return EngineError(f"CUDA: {call} failed with error {code} ({words}){remedy}")
