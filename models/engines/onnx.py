"""Models on ONNX Runtime: stateless ones, and decoders whose GroupQueryAttention shares its KV buffers between steps.

Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import onnxruntime

from models.device import Device, probe_device
from models.durable import sha256_of
from models.engine_record import content_digest, proven_provider, read_record
from models.engines import EngineError, EngineOptions, SlotTokens, TensorSpec, TooLittleMemory
from models.engines.cache import KeyValueCache
from models.engines.decoder import DecoderFacts, check_step, read_facts
from models.engines.free_memory import available_bytes, memory_refusal
from models.engines.onnx_binding import Bindings
from models.engines.onnx_providers import (
    PROVIDERS,
    ProviderOptions,
    cache_folder,
    library_version,
    provider_options,
    refusal_of,
)
from models.engines.tensors import check_inputs
from models.store import mark_used

log = logging.getLogger(__name__)

ARTEFACT = "model.onnx"

# Before 1.20 (Python 3.8 has 1.19.2 at most) GroupQueryAttention attends wrongly, without a word, when several tokens follow a past.
CONTINUES_PROMPTS = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) >= (1, 20)

DTYPES: Dict[str, str] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def open_engine(folder: Path, options: EngineOptions) -> OnnxEngine:
    """Open `folder`/model.onnx. Raises EngineError."""
    session = _open_session(folder / ARTEFACT, options)
    return OnnxEngine(session, str(folder / ARTEFACT), options.provider)


def open_generation_engine(folder: Path, options: EngineOptions) -> OnnxGenerationEngine:
    """Open a converted decoder with `options.slots` sequences of at most `options.context_tokens` tokens (bounded by the model).

    Raises EngineError, before anything is loaded, when weights and KV cache would not fit in the memory that is free now.
    """
    if options.provider != "cpu":
        raise EngineError(f"{folder}: ONNX Runtime generates on provider 'cpu' only, not {options.provider!r}; use runtime 'tensorrt'")
    if options.slots < 1 or options.context_tokens < 2:
        raise EngineError(f"{folder}: {options.slots} slots of {options.context_tokens} tokens; at least 1 slot of 2 tokens is needed")
    facts = read_facts(folder)
    capacity = min(options.context_tokens, facts.context_tokens)
    weight_bytes = sum(file.stat().st_size for file in folder.glob(f"{ARTEFACT}*"))
    refusal = memory_refusal(weight_bytes, facts.cache_bytes(options.slots, capacity), options.slots, capacity, available_bytes())
    if refusal is not None:
        raise TooLittleMemory(f"{folder}: {refusal}")
    session = _open_session(folder / ARTEFACT, options)
    _check_decoder(session, facts, folder)
    if not CONTINUES_PROMPTS:
        log.warning("ONNX Runtime %s: pieces of a prompt after its first are computed token by token", onnxruntime.__version__)
    names = [f"{index}.{part}" for index in range(facts.layers) for part in ("key", "value")]
    cache = KeyValueCache(names, options.slots, facts.kv_heads, capacity, facts.head_dim)
    return OnnxGenerationEngine(session, str(folder / ARTEFACT), facts, cache)


class OnnxEngine:
    """A stateless model; `run` may be called from one thread at a time."""

    def __init__(self, session: Any, artefact: str, provider: str) -> None:
        self.inputs = tuple(_spec(value) for value in session.get_inputs())
        self.outputs = tuple(_spec(value) for value in session.get_outputs())
        self.provider = provider
        self._artefact = artefact
        self._session: Optional[Any] = session
        # On a CPU `session.run` reads the arrays where they lie, and a copy of them gains nothing (docs/proven.md).
        self._bindings = None if provider == "cpu" else Bindings(session, self.inputs, self.outputs, "cuda")

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        if self._session is None:
            raise EngineError(f"{self._artefact} was closed; open it again")
        checked = check_inputs(self.inputs, inputs, self._artefact)
        names = [spec.name for spec in self.outputs]
        try:
            return self._bindings.run(checked) if self._bindings is not None else dict(zip(names, self._session.run(names, checked)))
        except Exception as error:  # ONNX Runtime's exceptions share no parent
            raise EngineError(f"{self._artefact} failed to run: {error}") from error

    def close(self) -> None:
        self._bindings = self._session = None


class OnnxGenerationEngine:
    """A decoder on the CPU. Running sequences advance as one batch over neighbouring rows of the cache, prompt chunks one row at a time.

    Past and present of a layer are bound to the same memory, so a step writes only the new tokens' keys and values. Everything else that
    a step reads or writes is bound once per shape as well: rows of `_ids`, `_seqlens` and `_logits` belong to the rows of the cache.
    """

    provider = "cpu"
    can_verify = False  # its kernels for one token and for several do not sum in the same order

    def __init__(self, session: Any, artefact: str, facts: DecoderFacts, cache: KeyValueCache) -> None:
        self.vocabulary = facts.vocabulary
        self.adapters = facts.adapters
        self.slots = cache.slots
        self.context_tokens = cache.capacity
        self._artefact = artefact
        self._session: Optional[Any] = session
        self._cache = cache
        self._bindings: Dict[Tuple[int, int], Any] = {}
        self._ids = np.zeros((cache.slots, 1), np.int64)
        self._chunk = np.zeros((1, cache.capacity), np.int64)
        self._seqlens = np.zeros(cache.slots, np.int32)
        self._adapters = len(facts.adapters)
        self._adapter = np.zeros(cache.slots, np.int64)
        self._total = np.zeros((), np.int32)
        self._num_logits = np.ones((), np.int64)
        self._logits = np.zeros((cache.slots, 1, facts.vocabulary), np.float32)

    def length(self, slot: int) -> int:
        self._cache.check_slot(slot)
        return self._cache.lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        self._cache.truncate(slot, length)

    def copy(self, source: int, target: int, length: int) -> None:
        self._cache.copy(source, target, length)

    def step(self, batch: Sequence[SlotTokens]) -> np.ndarray:
        if self._session is None:
            raise EngineError(f"{self._artefact} was closed; open it again")
        check_step(batch, self._cache.lengths, self._cache.capacity, self.vocabulary, self._adapters)
        running = [item for item in batch if len(item.tokens) == 1]
        if running:
            first = self._cache.gather([item.slot for item in running])
            self._decode(running, first)
        for item in batch:
            if len(item.tokens) > 1:
                self._prefill(item)
        rows = [self._cache.rows[item.slot] for item in batch]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return self._logits[rows[0] : rows[0] + len(rows), 0]
        return np.asarray(self._logits[rows, 0])

    def close(self) -> None:
        self._bindings.clear()
        self._session = None
        self._cache.buffers.clear()

    def _decode(self, running: Sequence[SlotTokens], first: int) -> None:
        for item in running:
            row = self._cache.rows[item.slot]
            self._ids[row] = item.tokens[0]
            self._adapter[row] = item.adapter
            self._seqlens[row] = self._cache.lengths[item.slot]
        self._run(first, len(running), self._ids[first : first + len(running)])
        for item in running:
            self._cache.lengths[item.slot] += 1

    def _prefill(self, item: SlotTokens) -> None:
        row = self._cache.rows[item.slot]
        count = len(item.tokens)
        if self._cache.lengths[item.slot] and not CONTINUES_PROMPTS:
            for token in item.tokens:
                self._decode([SlotTokens(item.slot, [token], item.adapter)], row)
            return
        self._chunk[0, :count] = item.tokens
        self._adapter[row] = item.adapter
        self._seqlens[row] = self._cache.lengths[item.slot] + count - 1
        self._run(row, 1, self._chunk[:, :count])
        self._cache.lengths[item.slot] += count

    def _run(self, first: int, count: int, ids: np.ndarray) -> None:
        """Run the rows `first` to `first + count` on `ids` [count, tokens]; their `_seqlens` are set already."""
        self._total[()] = int(self._seqlens[first : first + count].max()) + 1
        binding = self._bindings.get((first, count))
        if binding is None:
            binding = self._bindings[first, count] = self._bind(first, count)
        binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)  # type: ignore[union-attr]  # step refuses a closed engine
        except Exception as error:  # ONNX Runtime's exceptions share no parent
            raise EngineError(f"{self._artefact} failed to run {ids.shape[1]} tokens in {count} slots: {error}") from error

    def _bind(self, first: int, count: int) -> Any:
        binding = self._session.io_binding()  # type: ignore[union-attr]  # step refuses a closed engine
        rows = slice(first, first + count)
        inputs: Dict[str, np.ndarray] = {
            "seqlens_k": self._seqlens[rows],
            "total_sequence_length": self._total,
            "num_logits": self._num_logits,
        }
        if self._adapters:
            inputs["adapter"] = self._adapter[rows]
        outputs: Dict[str, np.ndarray] = {"logits": self._logits[rows]}
        for name, buffer in self._cache.buffers.items():
            inputs[f"past_key_values.{name}"] = outputs[f"present.{name}"] = buffer[rows]
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding


def _open_session(path: Path, options: EngineOptions) -> Any:
    refusal = refusal_of(options)
    if refusal is not None:
        raise EngineError(f"{path}: {refusal}")
    if not path.is_file():
        raise EngineError(f"{path} does not exist; convert the model first")
    record = read_record(path.parent)
    if record is not None and record.key.runtime == "onnxruntime" and proven_provider(record.key) != options.provider:
        proven = proven_provider(record.key)
        raise EngineError(f"{path} was proven on provider {proven!r}, not on {options.provider!r}; convert the model again for that one")
    wanted = PROVIDERS[options.provider]
    present = onnxruntime.get_available_providers()
    if wanted[0] not in present:
        raise EngineError(f"provider {options.provider!r} needs {wanted[0]}, this ONNX Runtime has only {', '.join(present)}")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads or max(1, _cores() - 1)
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    # Idle threads that spin take the cores of the camera pipelines beside them.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    asked = [each for each in _providers(path, options) if each[0] in present]
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=asked)
    except Exception as error:  # ONNX Runtime's exceptions share no parent
        raise EngineError(f"{path} cannot be opened: {error}") from error
    # What cannot be had is left out without a word.
    got = session.get_providers()
    if got[0] != wanted[0]:
        raise EngineError(f"{path}: asked for {wanted[0]}, got {got[0]}; check driver and CUDA libraries, or ask for provider 'cpu'")
    return session


def _providers(path: Path, options: EngineOptions) -> ProviderOptions:
    if options.provider == "cpu":
        return provider_options(options, "", Device("cpu", "cpu"), "")
    device = probe_device()
    if device.kind != "cuda":
        raise EngineError(f"{path}: provider {options.provider!r} needs an NVIDIA GPU and its driver: {device.reason}")
    model = _digest(path, options)
    version = library_version()
    if options.provider == "tensorrt" and options.cache_folder:
        cache = cache_folder(options, model, device, version)
        cache.mkdir(parents=True, exist_ok=True)
        mark_used(cache)
    return provider_options(options, model, device, version)


def _digest(path: Path, options: EngineOptions) -> str:
    record = read_record(path.parent)
    files = {file.name: "" for file in path.parent.glob(f"{ARTEFACT}*")}
    for name in files:
        known = record.files.get(name) if record is not None else None
        files[name] = known.sha256 if known is not None else sha256_of(path.parent / name)
    return content_digest(files, options.profiles)


def _check_decoder(session: Any, facts: DecoderFacts, folder: Path) -> None:
    inputs = {spec.name: spec for spec in map(_spec, session.get_inputs())}
    outputs = {value.name for value in session.get_outputs()}
    wanted = {"input_ids": 2, "seqlens_k": 1, "total_sequence_length": 0, "num_logits": 0, **({"adapter": 1} if facts.adapters else {})}
    parts = [f"{index}.{part}" for index in range(facts.layers) for part in ("key", "value")]
    problems: List[str] = [f"input {name}" for name, rank in wanted.items() if name not in inputs or len(inputs[name].shape) != rank]
    for part in parts:
        past = inputs.get(f"past_key_values.{part}")
        if past is None or past.dtype != "float32" or past.shape[1::2] != (facts.kv_heads, facts.head_dim):
            problems.append(f"input past_key_values.{part} float32[?, {facts.kv_heads}, ?, {facts.head_dim}]")
    problems += [f"output {name}" for name in ["logits", *(f"present.{part}" for part in parts)] if name not in outputs]
    problems += [f"no input {name}" for name in inputs if name not in wanted and name[len("past_key_values.") :] not in parts]
    if problems:
        raise EngineError(f"{folder}: {ARTEFACT} and generation.json disagree; expected {problems[0]}: convert the model again")


def _spec(value: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return TensorSpec(value.name, DTYPES.get(value.type, value.type), shape)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
