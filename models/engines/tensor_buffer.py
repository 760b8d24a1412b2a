"""Memory of one tensor that both sides reach."""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np

from models.engines.device_memory import DeviceMemory


class TensorBuffer:
    """One mapped piece of memory on an integrated GPU; elsewhere a page-locked one and one on the device, copied on the stream.

    `address` is the device's; it changes when the buffer grows.
    """

    def __init__(self, memory: DeviceMemory, size: int = 0) -> None:
        self._memory = memory
        self._host: Optional[np.ndarray] = None
        self.address = 0
        if size:
            self.grow(size)

    @property
    def size(self) -> int:
        return 0 if self._host is None else len(self._host)

    @property
    def host_address(self) -> int:
        return 0 if self._host is None else self._host.ctypes.data

    def grow(self, size: int) -> None:
        """Hold at least `size` bytes; what was in it is lost when it has to grow. An empty tensor needs an address too."""
        if self._host is not None and size <= self.size:
            return
        self.close()
        self._host, mapped = self._memory.allocate_host(max(1, size))
        try:
            self.address = mapped or self._memory.allocate(self.size)
        except BaseException:
            self._memory.free_host(self._host)
            self._host = None
            raise

    def view(self, dtype: str, shape: Tuple[int, ...]) -> np.ndarray:
        """The host's side as an array; valid until the buffer grows or closes."""
        kind = np.dtype(dtype)
        size = kind.itemsize * int(np.prod(shape, dtype=np.int64))
        return self._bytes(size).view(kind).reshape(shape)

    def upload(self, size: int) -> None:
        if not self._memory.is_mapped and size:
            self._memory.upload(self.address, self._bytes(size))

    def download(self, size: int) -> None:
        if not self._memory.is_mapped and size:
            self._memory.download(self._bytes(size), self.address)

    def close(self) -> None:
        if self._host is not None:
            if not self._memory.is_mapped:
                self._memory.free(self.address)
            self._memory.free_host(self._host)
        self._host, self.address = None, 0

    def _bytes(self, size: int) -> np.ndarray:
        if self._host is None or size > self.size:
            raise ValueError(f"{size} bytes of a buffer of {self.size}")
        return self._host[:size]
