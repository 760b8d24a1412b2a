"""The KV cache of a decoder in device memory. Nothing of it ever comes to the host."""

from __future__ import annotations

from math import gcd

from models.engines import EngineError
from models.engines.cache import SlotRows, Swap
from models.engines.device_memory import DeviceMemory

ALIGNMENT = 256  # of every address that TensorRT is given
SWAP_TOKENS = 64
MAX_PITCH = (1 << 31) - 1  # of a copy of rows


class DeviceKeyValueCache(SlotRows):
    """[tensors, slots, row tokens, bytes of a token] in one piece, so that one copy of rows moves tokens of all layers.

    `row_tokens`, at least `capacity`, is what a row has room for, such that every row starts aligned.
    """

    def __init__(self, memory: DeviceMemory, tensors: int, slots: int, capacity: int, row_tokens: int, token_bytes: int) -> None:
        super().__init__(slots, capacity)
        self.tensors = tensors
        self.row_tokens = row_tokens
        self.token_bytes = token_bytes
        self.pitch = slots * row_tokens * token_bytes
        if self.pitch > MAX_PITCH:
            raise EngineError(f"the KV cache of one layer has {self.pitch} bytes, {MAX_PITCH} are the most; ask for fewer slots or tokens")
        self._memory = memory
        self._base = memory.allocate(tensors * self.pitch)
        self._scratch = 0
        memory.zero(self._base, tensors * self.pitch)  # what is masked still has to be finite

    def address(self, tensor: int, row: int, token: int = 0) -> int:
        return self._base + tensor * self.pitch + (row * self.row_tokens + token) * self.token_bytes

    def append(self, row: int, token: int, source: int, source_pitch: int, count: int) -> None:
        """Queue a copy of `count` new tokens of every tensor, which lie `source_pitch` bytes apart, behind the first `token` of a row."""
        self._copy(self.address(0, row, token), self.pitch, source, source_pitch, count)

    def copy_row(self, source: int, target: int, length: int) -> None:
        self._copy(self.address(0, target), self.pitch, self.address(0, source), self.pitch, length)

    def swap_rows(self, swap: Swap, length: int) -> None:
        if not self._scratch:
            self._scratch = self._memory.allocate(self.tensors * SWAP_TOKENS * self.token_bytes)
        between = SWAP_TOKENS * self.token_bytes
        for start in range(0, length, SWAP_TOKENS):
            count = min(SWAP_TOKENS, length - start)
            one, other = self.address(0, swap.one, start), self.address(0, swap.other, start)
            self._copy(self._scratch, between, one, self.pitch, count)
            self._copy(one, self.pitch, other, self.pitch, count)
            self._copy(other, self.pitch, self._scratch, between, count)

    def close(self) -> None:
        self._memory.free(self._base)
        if self._scratch:
            self._memory.free(self._scratch)

    def _copy(self, target: int, target_pitch: int, source: int, source_pitch: int, count: int) -> None:
        if count:
            self._memory.copy_rows(target, target_pitch, source, source_pitch, count * self.token_bytes, self.tensors)


def aligned_tokens(tokens: int, token_bytes: int, most: int) -> int:
    """Tokens of a row that starts aligned: `tokens` or a little more, at most `most`; 0 when there is no such number."""
    step = ALIGNMENT // gcd(ALIGNMENT, token_bytes)
    up = -(-tokens // step) * step
    return up if up <= most else most // step * step
