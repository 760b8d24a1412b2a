"""A CUDA device made of host memory: one stream whose work is done when somebody waits, every address checked against what is allocated.

So a result that is read without waiting is stale here too, a buffer that is reused too early is read with the wrong values, and a copy
over the end of an allocation is an error at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from models.engines import EngineError

ALIGNMENT = 256
STREAMS: dict[int, FakeCuda] = {}


class FakeCuda:
    """Implements DeviceMemory. `moved` counts bytes by direction, `launched` the graphs that ran."""

    name = "fake"

    def __init__(self, is_mapped: bool = False, can_capture: bool = True, free: int = 1 << 32) -> None:
        self.is_mapped = is_mapped
        self.can_capture = can_capture
        self.free_memory = free
        self.stream = 1000 + len(STREAMS)
        self.moved = {"up": 0, "down": 0, "rows": 0}
        self.launched = 0
        self.captured = 0
        self.is_capturing = False
        self.is_closed = False
        self.live: dict[int, tuple[int, np.ndarray]] = {}
        self._pinned: dict[int, int] = {}
        self._queue: list[Callable[[], object]] = []
        STREAMS[self.stream] = self

    def allocate(self, size: int) -> int:
        block = np.full(size + ALIGNMENT, 0xA5, np.uint8)  # what was never written is no number: 0xA5A5… in any type
        address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.live[address] = (size, block)
        return address

    def free(self, address: int) -> None:
        self.synchronize()
        del self.live[address]

    def allocate_host(self, size: int) -> tuple[np.ndarray, int]:
        address = self.allocate(size)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        self._pinned[address] = size
        return array, address if self.is_mapped else 0

    def free_host(self, array: np.ndarray) -> None:
        del self._pinned[array.ctypes.data]
        self.free(array.ctypes.data)

    def upload(self, target: int, source: np.ndarray) -> None:
        self._check_pinned(source)
        self.moved["up"] += source.nbytes
        self._copy(target, source.ctypes.data, source.nbytes)

    def download(self, target: np.ndarray, source: int) -> None:
        self._check_pinned(target)
        self.moved["down"] += target.nbytes
        self._copy(target.ctypes.data, source, target.nbytes)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        assert width <= min(target_pitch, source_pitch), "rows overlap"
        self.moved["rows"] += width * height
        for row in range(height):
            self._copy(target + row * target_pitch, source + row * source_pitch, width)

    def zero(self, target: int, size: int) -> None:
        self.check(target, size)
        self.queue(lambda: ctypes.memset(target, 0, size))

    def synchronize(self) -> None:
        assert not self.is_capturing, "waiting is not allowed while a graph is captured"
        while self._queue:
            self._queue.pop(0)()

    def free_bytes(self) -> int:
        return self.free_memory

    def capture(self, queue: Callable[[], None]) -> Any:
        waiting, self._queue, self.is_capturing = self._queue, [], True
        try:
            queue()
            graph = self._queue
        finally:
            self._queue, self.is_capturing = waiting, False
        self.captured += 1
        return graph

    def launch(self, graph: Any) -> None:
        self.launched += 1
        for work in graph:
            self.queue(work)

    def forget(self, graph: Any) -> None:
        graph.clear()

    def close(self) -> None:
        self.synchronize()
        assert not self.live, f"{len(self.live)} allocations were never freed"
        self.is_closed = True

    def queue(self, work: Callable[[], object]) -> None:
        self._queue.append(work)

    def check(self, address: int, size: int) -> None:
        """Raises EngineError as a device would with an illegal address."""
        if not any(start <= address and address + size <= start + length for start, (length, _) in self.live.items()):
            raise EngineError(f"illegal address: {size} bytes at {address:#x}")

    def _copy(self, target: int, source: int, size: int) -> None:
        self.check(target, size)
        self.check(source, size)
        self.queue(lambda: ctypes.memmove(target, source, size))

    def _check_pinned(self, array: np.ndarray) -> None:
        address = array.ctypes.data
        assert any(start <= address and address + array.nbytes <= start + size for start, size in self._pinned.items()), "not page-locked"


def open_memory() -> FakeCuda:
    """As the packages behind `device_memory.py` do."""
    return FakeCuda(is_mapped=True)
