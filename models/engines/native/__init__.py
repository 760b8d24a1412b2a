"""Decoders in native code on the CPU: decoder.c, compiled for this very device when the model was converted, over mapped weights.

Prompts and running sequences go through one step together, and no request changes another's answer by a bit.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

import numpy as np

from models.engines import Engine, EngineError, EngineOptions, SlotTokens, TooLittleMemory
from models.engines.decoder import DecoderFacts, check_step, read_facts
from models.engines.free_memory import available_bytes, granted, memory_refusal
from models.engines.native.weights import ARTEFACT, LIBRARY, Weights, cpu_identity, open_weights

STEP_TOKENS = 512
TILE = 16
# Pauses of a waiting thread, about 10 and 100 microseconds, before it offers its core to others.
SPINS = {False: 400, True: 4000}


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("records", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("has_offset", ctypes.c_int32),
        ("is_wide", ctypes.c_int32),
    ]


NORMS = ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm")
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


class _Layer(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in NORMS), *((name, _Matrix) for name in MATRICES)]


COUNTS = ("layers", "heads", "kv_heads", "head_dim", "hidden", "inner", "vocabulary", "slots", "capacity", "threads", "spin", "is_fine")


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in COUNTS),
        ("epsilon", ctypes.c_float),
        ("layer", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("embedding", _Matrix),
        ("head", _Matrix),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


class _Run(ctypes.Structure):
    _fields_ = [("slot", ctypes.c_int32), ("position", ctypes.c_int32), ("first", ctypes.c_int32), ("count", ctypes.c_int32)]


def open_engine(folder: Path, options: EngineOptions) -> Engine:
    raise EngineError(f"{folder}: the native engine generates text only; convert the model again for runtime 'onnxruntime'")


def open_generation_engine(folder: Path, options: EngineOptions) -> NativeGenerationEngine:
    """Open a converted decoder. Raises EngineError: another CPU, a damaged file, too little memory."""
    if options.provider != "cpu":
        raise EngineError(f"{folder}: the native engine runs on provider 'cpu' only, not {options.provider!r}; set worker.provider to cpu")
    if options.slots < 1 or options.context_tokens < 2:
        raise EngineError(f"{folder}: {options.slots} slots of {options.context_tokens} tokens; at least 1 slot of 2 tokens is needed")
    facts = read_facts(folder)
    weights = open_weights(folder / ARTEFACT)
    if weights.header.cpu != cpu_identity():
        raise EngineError(f"{folder} was compiled for {weights.header.cpu}, this is {cpu_identity()}; convert the model on this device")
    capacity = min(options.context_tokens, facts.context_tokens)
    cache_bytes = facts.cache_bytes(options.slots, capacity) // 2
    refusal = memory_refusal((folder / ARTEFACT).stat().st_size, cache_bytes, options.slots, capacity, available_bytes())
    if refusal is not None:
        raise TooLittleMemory(f"{folder}: {refusal}")
    try:
        library = ctypes.CDLL(str(folder / LIBRARY))
    except OSError as error:
        raise EngineError(f"{folder / LIBRARY} cannot be loaded ({error}); convert the model again") from error
    return NativeGenerationEngine(library, folder, facts, weights, options, capacity)


class NativeGenerationEngine:
    """The cache is float16 [layers, slots, kv_heads, capacity, head_dim], keys in tiles of 16 positions."""

    provider = "cpu"
    can_verify = True
    adapters: Tuple[str, ...] = ()

    def __init__(
        self, library: Any, folder: Path, facts: DecoderFacts, weights: Weights, options: EngineOptions, context_tokens: int
    ) -> None:
        self.vocabulary = facts.vocabulary
        self.slots = options.slots
        self.context_tokens = context_tokens
        self._artefact = str(folder / ARTEFACT)
        self._facts = facts
        self._weights = weights
        self._lengths = [0] * options.slots
        capacity = -(-context_tokens // TILE) * TILE
        shape = (facts.layers, options.slots, facts.kv_heads, capacity, facts.head_dim)
        self._keys, self._values = granted(shape, np.float16), granted(shape, np.float16)
        self._layers = (_Layer * facts.layers)(*(self._layer(layer) for layer in range(facts.layers)))
        self._head = self._matrix("output" if "output" in weights.header.matrices else "token_embd")
        self._logits = np.empty((STEP_TOKENS, self._head.rows), np.float32)
        threads = min(options.threads or max(1, _cores() - 1), 64)
        sizes = (facts.layers, facts.heads, facts.kv_heads, facts.head_dim, facts.hidden, weights.header.inner, facts.vocabulary)
        self._model = _Model(
            *sizes, options.slots, capacity, threads, SPINS[options.spinning], weights.header.is_fine, weights.header.epsilon
        )
        self._model.layer = ctypes.addressof(self._layers)
        self._model.final_norm = self._vector("output_norm", facts.hidden)
        self._model.embedding = self._matrix("token_embd")
        self._model.head = self._head
        self._model.cosine = self._vector("rope.cosine", context_tokens * facts.head_dim // 2)
        self._model.sine = self._vector("rope.sine", context_tokens * facts.head_dim // 2)
        self._model.keys, self._model.values = self._keys.ctypes.data, self._values.ctypes.data
        self._check()
        self._library = library
        self._library.hs_open.restype = ctypes.c_void_p
        self._library.hs_close.argtypes = [ctypes.c_void_p]
        pointer, count = ctypes.c_void_p, ctypes.c_int32
        self._library.hs_step.argtypes = [pointer, pointer, count, pointer, count, pointer, count, pointer]
        self._engine: Optional[int] = library.hs_open(ctypes.byref(self._model), STEP_TOKENS)
        if not self._engine:
            raise EngineError(f"{self._artefact}: no memory for {STEP_TOKENS} tokens a step, or {threads} threads; ask for fewer slots")

    def length(self, slot: int) -> int:
        self._check_slot(slot)
        return self._lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        self._check_slot(slot)
        if not 0 <= length <= self._lengths[slot]:
            raise EngineError(f"slot {slot} holds {self._lengths[slot]} tokens and cannot be truncated to {length}")
        self._lengths[slot] = length

    def copy(self, source: int, target: int, length: int) -> None:
        self._check_slot(source)
        self._check_slot(target)
        if not 0 <= length <= self._lengths[source]:
            raise EngineError(f"slot {source} holds {self._lengths[source]} tokens; {length} of them cannot be copied to slot {target}")
        tiled = -(-length // TILE) * TILE
        if source != target:
            self._keys[:, target, :, :tiled] = self._keys[:, source, :, :tiled]
            self._values[:, target, :, :length] = self._values[:, source, :, :length]
        self._lengths[target] = length

    def step(self, batch: Sequence[SlotTokens]) -> np.ndarray:
        self._refuse_adapters(batch)
        check_step(batch, self._lengths, self.context_tokens, self.vocabulary, can_verify=True)
        if sum(len(item.tokens) for item in batch) > STEP_TOKENS:
            return np.concatenate([self._in_pieces(item) for item in batch])
        ends = np.cumsum([len(item.tokens) for item in batch])
        return self._run(batch, [at for item, end in zip(batch, ends.tolist()) for at in range(end - item.logits, end)])

    def all_logits(self, item: SlotTokens) -> np.ndarray:
        """Append tokens; float32 logits [len(tokens), vocabulary] after each of them: what verification needs."""
        return np.array(self.step([replace(item, logits=len(item.tokens))]))

    def close(self) -> None:
        if self._engine:
            self._library.hs_close(self._engine)
        self._engine = None

    def _in_pieces(self, item: SlotTokens) -> np.ndarray:
        """More than a step takes: sequence after sequence, piece after piece."""
        first = len(item.tokens) - item.logits
        logits: List[np.ndarray] = []
        for at in range(0, len(item.tokens), STEP_TOKENS):
            piece = SlotTokens(item.slot, item.tokens[at : at + STEP_TOKENS])
            logits.append(self._run([piece], range(min(max(0, first - at), len(piece.tokens)), len(piece.tokens))).copy())
        return np.concatenate(logits)

    def _run(self, batch: Sequence[SlotTokens], wanted: Sequence[int]) -> np.ndarray:
        if not self._engine:
            raise EngineError(f"{self._artefact} was closed; open it again")
        runs = (_Run * len(batch))()
        first = 0
        for index, item in enumerate(batch):
            runs[index] = _Run(item.slot, self._lengths[item.slot], first, len(item.tokens))
            first += len(item.tokens)
        tokens = np.fromiter((token for item in batch for token in item.tokens), np.int32, first)
        places = np.array(wanted, np.int32)
        logits = self._logits[: len(places)]
        self._library.hs_step(
            self._engine, tokens.ctypes.data, first, ctypes.addressof(runs), len(batch), places.ctypes.data, len(places), logits.ctypes.data
        )
        for item in batch:
            self._lengths[item.slot] += len(item.tokens)
        return logits[:, : self.vocabulary]

    def _layer(self, layer: int) -> _Layer:
        facts, inner = self._facts, self._weights.header.inner
        queries, keys = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
        shapes = {
            "attn_q": (queries, facts.hidden),
            "attn_k": (keys, facts.hidden),
            "attn_v": (keys, facts.hidden),
            "attn_output": (facts.hidden, queries),
            "ffn_gate": (inner, facts.hidden),
            "ffn_up": (inner, facts.hidden),
            "ffn_down": (facts.hidden, inner),
        }
        values = _Layer()
        for norm in NORMS:
            name = f"blk.{layer}.{norm}"
            is_optional = norm in ("attn_q_norm", "attn_k_norm")
            if not is_optional or name in self._weights.header.arrays:
                setattr(values, norm, self._vector(name, facts.head_dim if is_optional else facts.hidden))
        for part in MATRICES:
            matrix = self._matrix(f"blk.{layer}.{part}")
            if (matrix.rows, matrix.columns) != shapes[part]:
                raise EngineError(f"{self._artefact}: blk.{layer}.{part} is {matrix.rows} x {matrix.columns}, not {shapes[part]}")
            setattr(values, part, matrix)
        return values

    def _matrix(self, name: str) -> _Matrix:
        entry = self._weights.matrix(name)
        bias = self._vector(f"{name}.bias", entry.rows) if f"{name}.bias" in self._weights.header.arrays else None
        return _Matrix(self._weights.address(entry), bias, entry.rows, entry.columns, entry.bits, entry.has_offset, entry.is_wide)

    def _vector(self, name: str, least: int) -> int:
        values = self._weights.array(name)
        if values.size < least:
            raise EngineError(f"{self._artefact}: array {name!r} has {values.size} numbers, {least} are needed; convert the model again")
        return int(values.ctypes.data)

    def _check(self) -> None:
        """What the native code relies on."""
        facts, model = self._facts, self._model
        is_sound = (
            facts.head_dim % TILE == 0
            and facts.heads % facts.kv_heads == 0
            and model.inner % 32 == 0
            and (model.embedding.columns, model.head.columns) == (facts.hidden, facts.hidden)
            and min(model.embedding.rows, model.head.rows) >= facts.vocabulary
        )
        if not is_sound:
            raise EngineError(f"{self._artefact} and generation.json disagree; convert the model again")

    def _refuse_adapters(self, batch: Sequence[SlotTokens]) -> None:
        adapter = next((item.adapter for item in batch if item.adapter), 0)
        if adapter:
            raise EngineError(f"{self._artefact} holds no adapter {adapter}; convert the model for runtime 'onnxruntime' to keep adapters")

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise EngineError(f"slot {slot} does not exist: the engine was opened with {self.slots} slots")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
