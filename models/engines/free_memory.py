"""Whether a decoder fits before it is loaded, and taking what it was granted: on a device without swap the alternative is that the kernel
ends a process of its choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Tuple

import numpy as np

MEMORY_RESERVE = 256 << 20


def memory_refusal(weight_bytes: int, cache_bytes: int, slots: int, capacity: int, free_bytes: Optional[int]) -> Optional[str]:
    """Why a decoder does not fit into `free_bytes` with a reserve for activations; None when it does or nothing is known."""
    if free_bytes is None or weight_bytes + cache_bytes + MEMORY_RESERVE <= free_bytes:
        return None
    return (
        f"needs {weight_bytes >> 20} MiB of weights, {cache_bytes >> 20} MiB of KV cache ({slots} slots of {capacity} tokens) and "
        f"{MEMORY_RESERVE >> 20} MiB to work in, but {free_bytes >> 20} MiB are free; ask for fewer slots or context_tokens"
    )


def granted(shape: Tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros whose pages are taken now. Those of `numpy.zeros` are only promised: the next model, or another process, would be granted them
    too, and the kernel would find out in the middle of an answer."""
    array = np.empty(shape, dtype)
    array.fill(0)
    return array


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> Optional[int]:
    """MemAvailable of the kernel (on a Jetson: of CPU and GPU together); None where there is no /proc."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)
