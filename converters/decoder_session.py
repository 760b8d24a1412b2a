"""A converted decoder on ONNX Runtime with bare numpy caches, past and present bound to the same memory.

For verification: unlike the generation engine it gives the logits of every position.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from converters.decoder import Decoder


class DecoderSession:
    def __init__(self, folder: Path, decoder: Decoder, rows: int = 1, capacity: int = 96, threads: int = 2) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        shape = (rows, decoder.kv_heads, capacity, decoder.head_dim)
        names = [f"{layer}.{part}" for layer in range(decoder.layers) for part in ("key", "value")]
        self._cache = {name: np.zeros(shape, np.float32) for name in names}

    def step(self, ids: Sequence[Sequence[int]], lengths: Sequence[int], num_logits: int = 1, first_row: int = 0) -> NDArray[np.float32]:
        """Append ids [rows][tokens] to rows that hold `lengths` tokens; logits [rows, num_logits, vocabulary]."""
        rows = np.array(ids, np.int64)
        after = np.array(lengths, np.int32) + np.int32(rows.shape[1])
        binding: Any = self._session.io_binding()
        binding.bind_cpu_input("input_ids", rows)
        binding.bind_cpu_input("seqlens_k", after - np.int32(1))
        binding.bind_cpu_input("total_sequence_length", np.array(after.max(), np.int32))
        binding.bind_cpu_input("num_logits", np.array(num_logits, np.int64))
        for name, whole in self._cache.items():
            cache = whole[first_row : first_row + len(rows)]
            binding.bind_input(f"past_key_values.{name}", "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
            binding.bind_output(f"present.{name}", "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        logits: NDArray[np.float32] = binding.get_outputs()[-1].numpy()
        return logits
