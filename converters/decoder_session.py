"""A converted decoder on ONNX Runtime with bare numpy caches, in either form.

For verification: unlike the generation engine it gives the logits of every position, and it runs the standard form without TensorRT.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from converters.decoder import Decoder

Cache = dict[str, NDArray[Any]]


class DecoderSession:
    """Rows of tokens, each with its own cache; which form `model.onnx` has is read from its inputs."""

    def __init__(self, folder: Path, decoder: Decoder, rows: int = 1, capacity: int = 96, threads: int = 2) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        kinds = {value.name: value.type for value in self._session.get_inputs()}
        self.has_adapters = "adapter" in kinds
        self.is_standard = "lengths" in kinds
        names = [f"{layer}.{part}" for layer in range(decoder.layers) for part in ("key", "value")]
        if self.is_standard:
            shape = (rows, capacity, decoder.kv_heads, decoder.head_dim)
        else:
            shape = (rows, decoder.kv_heads, capacity, decoder.head_dim)
        number = np.float16 if kinds.get("past.0.key") == "tensor(float16)" else np.float32
        self.cache: Cache = {name: np.zeros(shape, number) for name in names}

    def step(
        self,
        ids: Sequence[Sequence[int]],
        lengths: Sequence[int],
        num_logits: int = 1,
        first_row: int = 0,
        adapters: Sequence[int] | None = None,
        past: int | None = None,
    ) -> NDArray[np.float32]:
        """Append ids [rows][tokens] to rows that hold `lengths` tokens; logits [rows, num_logits, vocabulary].

        `adapters`: one number for each row. `past`: how many tokens of the cache the standard form is shown; as many as needed, by default.
        """
        rows = np.array(ids, np.int64)
        chosen = {"adapter": np.array(adapters or [0] * len(rows), np.int64)} if self.has_adapters else {}
        cache = {name: whole[first_row : first_row + len(rows)] for name, whole in self.cache.items()}
        if self.is_standard:
            return self._standard(rows, lengths, num_logits, cache, chosen, past)
        return self._onnxruntime(rows, lengths, num_logits, cache, chosen)

    def run(self, outputs: Sequence[str], inputs: Cache) -> list[NDArray[Any]]:
        """Run the graph as it is."""
        values: list[NDArray[Any]] = self._session.run(list(outputs), inputs)
        return values

    def _standard(
        self, rows: NDArray[np.int64], lengths: Sequence[int], num_logits: int, cache: Cache, chosen: Cache, past: int | None
    ) -> NDArray[np.float32]:
        batch, sequence = rows.shape
        places = np.arange(sequence - num_logits, sequence, dtype=np.int32)
        inputs: Cache = {"input_ids": rows, "lengths": np.array(lengths, np.int32), "logits_at": np.tile(places, (batch, 1)), **chosen}
        shown = past or max(1, *lengths)
        inputs |= {f"past.{name}": np.ascontiguousarray(whole[:, :shown]) for name, whole in cache.items()}
        logits, *new = self.run(["logits", *(f"new.{name}" for name in cache)], inputs)
        for whole, values in zip(cache.values(), new, strict=True):
            for row, length in enumerate(lengths):
                whole[row, length : length + sequence] = values[row]
        return logits

    def _onnxruntime(
        self, rows: NDArray[np.int64], lengths: Sequence[int], num_logits: int, cache: Cache, chosen: Cache
    ) -> NDArray[np.float32]:
        after = np.array(lengths, np.int32) + np.int32(rows.shape[1])
        binding: Any = self._session.io_binding()
        binding.bind_cpu_input("input_ids", rows)
        binding.bind_cpu_input("seqlens_k", after - np.int32(1))
        binding.bind_cpu_input("total_sequence_length", np.array(after.max(), np.int32))
        binding.bind_cpu_input("num_logits", np.array(num_logits, np.int64))
        for name, values in chosen.items():
            binding.bind_cpu_input(name, values)
        for name, whole in cache.items():
            binding.bind_input(f"past_key_values.{name}", "cpu", 0, np.float32, whole.shape, whole.ctypes.data)
            binding.bind_output(f"present.{name}", "cpu", 0, np.float32, whole.shape, whole.ctypes.data)
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        logits: NDArray[np.float32] = binding.get_outputs()[-1].numpy()
        return logits
