"""Decoders as plans of TensorRT, in the standard form of `converters/decoder_graph.py`.

Running sequences advance as one batch over neighbouring rows of the cache, pieces of prompts one row at a time. A model reads the past
where it lies and gives only the keys and values of the new tokens. Those of a piece of a prompt are written straight behind the past;
those of a step go to a fixed place first, from where one copy on the device appends them in all layers: so the addresses of a step stay
as they are, and with them its CUDA graph.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np

from models.engines import DeviceLost, EngineError, EngineOptions, SlotTokens, TensorSpec, TooLittleMemory
from models.engines.decoder import DecoderFacts, check_step, read_facts
from models.engines.device_cache import ALIGNMENT, DeviceKeyValueCache, aligned_tokens
from models.engines.device_memory import DeviceMemory
from models.engines.free_memory import available_bytes, memory_refusal
from models.engines.tensor_buffer import TensorBuffer
from models.engines.tensorrt_execution import Execution
from models.engines.tensorrt_plan import Plan

log = logging.getLogger(__name__)

# A single row is given its past in steps of so many tokens: equal shapes for as long, at the price of some masked keys.
PAST_STEP = 128


@dataclass(frozen=True)
class Bounds:
    """What the profiles of a plan admit: rows of a step, tokens of a piece of a prompt, fewest and most tokens of a past."""

    rows: int
    piece: int
    past_least: int
    past_most: int


def open_generation(folder: Path, plan: Plan, memory: DeviceMemory, options: EngineOptions) -> TensorRtGenerationEngine:
    """The decoder of a loaded plan with `options.slots` sequences. Raises EngineError before memory is taken that is not there."""
    facts = read_facts(folder)
    check_decoder(plan, facts)
    bounds = read_bounds(plan)
    if options.slots < 1 or options.context_tokens < 2:
        raise EngineError(f"{folder}: {options.slots} slots of {options.context_tokens} tokens; at least 1 slot of 2 tokens is needed")
    capacity = min(options.context_tokens, facts.context_tokens, bounds.past_most)
    token_bytes = facts.kv_heads * facts.head_dim * np.dtype(_past(plan).dtype).itemsize
    row_tokens = aligned_tokens(max(capacity, bounds.past_least), token_bytes, bounds.past_most)
    if row_tokens < bounds.past_least or row_tokens < 2:
        raise EngineError(
            f"{plan.artefact}: a past of {bounds.past_least} to {bounds.past_most} tokens of {token_bytes} bytes cannot be aligned"
        )
    cache_bytes = 2 * facts.layers * options.slots * row_tokens * token_bytes
    free = max(memory.free_bytes(), (available_bytes() or 0) if memory.is_mapped else 0)
    refusal = memory_refusal(0, cache_bytes, options.slots, capacity, free)
    if refusal is not None:
        raise TooLittleMemory(f"{folder}: {refusal}")
    cache = DeviceKeyValueCache(memory, 2 * facts.layers, options.slots, min(capacity, row_tokens), row_tokens, token_bytes)
    return TensorRtGenerationEngine(plan, memory, facts, cache, bounds, options.cuda_graph)


class TensorRtGenerationEngine:
    """A decoder whose keys and values stay on the device; of a step only the logits that were asked for come to the host."""

    provider = "tensorrt"
    can_verify = False  # its plans have profiles for one row of logits

    def __init__(
        self, plan: Plan, memory: DeviceMemory, facts: DecoderFacts, cache: DeviceKeyValueCache, bounds: Bounds, captures: bool
    ) -> None:
        self.vocabulary = facts.vocabulary
        self.adapters = facts.adapters
        self.slots = cache.slots
        self.context_tokens = cache.capacity
        self._plan = plan
        self._memory = memory
        self._facts = facts
        self._cache = cache
        self._bounds = bounds
        self._thread = threading.get_ident()
        self._is_open = True
        self._captures = captures and memory.can_capture
        self._execution = Execution(plan, memory, captures)
        self._inputs: Dict[str, TensorSpec] = {spec.name: spec for spec in plan.inputs if not spec.name.startswith("past.")}
        self._parts = [f"{layer}.{part}" for layer in range(facts.layers) for part in ("key", "value")]
        self._rows_most = min(bounds.rows, cache.slots)
        tokens = max(self._rows_most, bounds.piece)
        self._buffers = {name: TensorBuffer(memory, tokens * np.dtype(spec.dtype).itemsize) for name, spec in self._inputs.items()}
        self._logits = TensorBuffer(memory, self._rows_most * facts.vocabulary * 4)
        self._results = np.empty((cache.slots, facts.vocabulary), np.float32)
        self._new, self._new_pitch = 0, 0
        self._provide_new(self._rows_most)

    def length(self, slot: int) -> int:
        self._cache.check_slot(slot)
        return self._cache.lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        self._cache.truncate(slot, length)

    def copy(self, source: int, target: int, length: int) -> None:
        self._check_usable()
        self._cache.copy(source, target, length)

    def step(self, batch: Sequence[SlotTokens]) -> np.ndarray:
        self._check_usable()
        check_step(batch, self._cache.lengths, self._cache.capacity, self.vocabulary, len(self._facts.adapters))
        places = {item.slot: place for place, item in enumerate(batch)}
        running = [item for item in batch if len(item.tokens) == 1]
        for start in range(0, len(running), self._rows_most):
            group = running[start : start + self._rows_most]
            first = self._cache.gather([item.slot for item in group])
            group = sorted(group, key=lambda item: self._cache.rows[item.slot])
            logits = self._decode(group, first)
            if [item.slot for item in group] == [item.slot for item in batch]:
                return logits
            self._results[[places[item.slot] for item in group]] = logits
        for item in batch:
            if len(item.tokens) > 1:
                self._results[places[item.slot]] = self._prefill(item)[0]
        return self._results[: len(batch)]

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        try:
            self._memory.synchronize()
            self._execution.close()
            for buffer in (*self._buffers.values(), self._logits):
                buffer.close()
            self._memory.free(self._new)
            self._cache.close()
            self._memory.close()
        except (EngineError, DeviceLost) as error:
            log.warning("%s could not be closed: %s", self._plan.artefact, error)

    def _decode(self, group: Sequence[SlotTokens], first: int) -> np.ndarray:
        """One token of each of `group`, whose rows follow one another from `first`."""
        held = [self._cache.lengths[item.slot] for item in group]
        past = self._cache.row_tokens if len(group) > 1 else self._past_tokens(held[0])
        is_behind = len(group) == 1 and not self._captures and self._is_aligned(held[0])
        logits = self._run([item.tokens for item in group], held, [item.adapter for item in group], first, past, is_behind)
        for item in group:
            self._cache.lengths[item.slot] += 1
        return logits

    def _prefill(self, item: SlotTokens) -> np.ndarray:
        row = self._cache.rows[item.slot]
        logits = np.empty(0)
        for start in range(0, len(item.tokens), self._bounds.piece):
            tokens = item.tokens[start : start + self._bounds.piece]
            held = self._cache.lengths[item.slot]
            past = max(held, self._bounds.past_least, 1)
            logits = self._run([tokens], [held], [item.adapter], row, past, self._is_aligned(held))
            self._cache.lengths[item.slot] += len(tokens)
        return logits

    def _run(
        self, tokens: Sequence[Sequence[int]], held: Sequence[int], adapters: Sequence[int], first: int, past: int, is_behind: bool
    ) -> np.ndarray:
        """Logits [rows, vocabulary] after the last of `tokens` of each row; `is_behind`: new keys go straight behind the past."""
        rows, count = len(tokens), len(tokens[0])
        if not is_behind:
            self._provide_new(rows * count)
        shapes = self._fill(tokens, held, adapters)
        shape = (rows, past, self._facts.kv_heads, self._facts.head_dim)
        addresses = {name: buffer.address for name, buffer in self._buffers.items()}
        addresses["logits"] = self._logits.address
        for tensor, part in enumerate(self._parts):
            shapes[f"past.{part}"] = shape
            addresses[f"past.{part}"] = self._cache.address(tensor, first)
            behind = self._cache.address(tensor, first, held[0])
            addresses[f"new.{part}"] = behind if is_behind else self._new + tensor * self._new_pitch
        self._execution.reshape(shapes)
        self._execution.bind(addresses)
        sizes = {name: buffer.view(self._inputs[name].dtype, shapes[name]).nbytes for name, buffer in self._buffers.items()}

        def upload() -> None:
            for name, buffer in self._buffers.items():
                buffer.upload(sizes[name])

        try:
            self._execution.run(upload, lambda: self._logits.download(rows * self.vocabulary * 4))
            if not is_behind:
                row_bytes = count * self._cache.token_bytes
                for index, length in enumerate(held):
                    self._cache.append(first + index, length, self._new + index * row_bytes, self._new_pitch, count)
        finally:
            # Also after a failure: what was queued reads and writes our memory.
            self._memory.synchronize()
        return self._logits.view("float32", (rows, self.vocabulary))

    def _fill(self, tokens: Sequence[Sequence[int]], held: Sequence[int], adapters: Sequence[int]) -> Dict[str, Tuple[int, ...]]:
        rows, count = len(tokens), len(tokens[0])
        values = {"input_ids": tokens, "lengths": held, "logits_at": [[count - 1]] * rows, "adapter": adapters}
        shapes: Dict[str, Tuple[int, ...]] = {"input_ids": (rows, count), "lengths": (rows,), "logits_at": (rows, 1), "adapter": (rows,)}
        for name, buffer in self._buffers.items():
            buffer.view(self._inputs[name].dtype, shapes[name])[...] = values[name]
        return {name: shapes[name] for name in self._buffers}

    def _past_tokens(self, held: int) -> int:
        steps = -(-max(held, 1) // PAST_STEP) * PAST_STEP
        return min(max(steps, self._bounds.past_least), self._cache.row_tokens)

    def _is_aligned(self, held: int) -> bool:
        return held * self._cache.token_bytes % ALIGNMENT == 0

    def _provide_new(self, tokens: int) -> None:
        """A place for the new keys and values of so many tokens, in every tensor aligned."""
        pitch = -(-tokens * self._cache.token_bytes // ALIGNMENT) * ALIGNMENT
        if pitch > self._new_pitch:
            if self._new:
                self._memory.free(self._new)
            self._new, self._new_pitch = self._memory.allocate(self._cache.tensors * pitch), pitch

    def _check_usable(self) -> None:
        if not self._is_open:
            raise EngineError(f"{self._plan.artefact} was closed; open it again")
        if threading.get_ident() != self._thread:
            raise EngineError(f"{self._plan.artefact} belongs to the thread that opened it; open it in the thread that runs it")


def check_decoder(plan: Plan, facts: DecoderFacts) -> None:
    """Refuse a plan that is no decoder of the standard form with the shapes of generation.json. Raises EngineError."""
    inputs = {spec.name: spec for spec in plan.inputs}
    outputs = {spec.name: spec for spec in plan.outputs}
    parts = [f"{layer}.{part}" for layer in range(facts.layers) for part in ("key", "value")]
    ranks = {"input_ids": 2, "lengths": 1, "logits_at": 2}
    problems: List[str] = [f"input {name}" for name, rank in ranks.items() if name not in inputs or len(inputs[name].shape) != rank]
    for tensors, side, names in ((inputs, "past", parts), (outputs, "new", parts)):
        for name in (f"{side}.{part}" for part in names):
            spec = tensors.get(name)
            if spec is None or spec.shape[2:] != (facts.kv_heads, facts.head_dim) or spec.dtype != _past(plan).dtype:
                problems.append(f"{name} [?, ?, {facts.kv_heads}, {facts.head_dim}] in one type")
    logits = outputs.get("logits")
    if logits is None or logits.dtype != "float32" or logits.shape[-1] != facts.vocabulary:
        problems.append(f"output logits float32 [?, ?, {facts.vocabulary}]")
    known = {*ranks, "adapter", *(f"past.{part}" for part in parts)}
    problems += [f"no input {name}" for name in inputs if name not in known]
    if problems:
        raise EngineError(f"{plan.artefact} and generation.json disagree; expected {problems[0]}: convert the model again")


def read_bounds(plan: Plan) -> Bounds:
    """What all profiles of a decoder's plan together allow."""
    profiles = [(profile["input_ids"], profile["past.0.key"]) for profile in plan.profiles]
    return Bounds(
        rows=max(ids[2][0] for ids, _ in profiles if ids[0][1] <= 1),
        piece=max(ids[2][1] for ids, _ in profiles),
        past_least=max(past[0][1] for _, past in profiles),
        past_most=min(past[2][1] for _, past in profiles),
    )


def _past(plan: Plan) -> TensorSpec:
    found = next((spec for spec in plan.inputs if spec.name == "past.0.key"), None)
    if found is None:
        raise EngineError(f"{plan.artefact} is no decoder: it has no input past.0.key; convert the model again")
    return found
