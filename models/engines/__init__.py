"""The engine contract: what every runtime offers to the tasks above it, and the literal table of artefacts and their runtimes.

An engine belongs to one thread. Arrays that it returns are valid until the next call on the same engine.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Protocol, Sequence, Tuple

import numpy as np

from models.checksums import damage_of


class EngineError(RuntimeError):
    """An engine could not be opened or run; the message names the artefact, the cause and the remedy."""


class TooLittleMemory(EngineError):
    """An engine was not opened because it would not fit; nothing was loaded. The message has the figures."""


class DeviceLost(BaseException):
    """The CUDA context of this process is broken, for every engine in it: the process has to end and another to start.

    No Exception, so that nothing which answers one request and goes on takes it for the fault of that request.
    """


@dataclass(frozen=True)
class EngineOptions:
    """How to open an engine.

    provider  `cpu`, `cuda` or `tensorrt` for ONNX Runtime: what is asked must be what is got, else EngineError
    threads   intra-op threads; 0 means: all cores but one, at least one
    spinning  idle threads spin instead of sleeping: faster alone (CPU decode about a quarter), but it takes cores from neighbours
    slots     generation only: sequences held at once
    context_tokens  generation only: tokens of one sequence, prompt and answer together (the KV capacity of a slot)
    precision  that of the plan, or `auto` for any; with provider `tensorrt` what ONNX Runtime builds its engines in
    cuda_graph      capture and replay what repeats with equal shapes
    memory     what reaches device memory: `cuda-python`, `pycuda`, or `auto` for the first that can be imported
    workspace_bytes  provider `tensorrt`: scratch memory of a build; 0 leaves it to TensorRT
    cache_folder     provider `tensorrt`: where its engines and timings are kept; without one each start builds anew
    profiles         provider `tensorrt`: input name to (least, most likely, largest) shape of inputs with dynamic dimensions
    """

    provider: str = "cpu"
    threads: int = 0
    spinning: bool = False
    slots: int = 4
    context_tokens: int = 2048
    precision: str = "auto"
    cuda_graph: bool = True
    memory: str = "auto"
    workspace_bytes: int = 0
    cache_folder: str = ""
    profiles: Dict[str, Tuple[Tuple[int, ...], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name and shape of an input or output; a dimension of -1 is dynamic."""

    name: str
    dtype: str
    shape: Tuple[int, ...]


class Engine(Protocol):
    """A loaded model without state between calls."""

    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    provider: str

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Infer once. Raises EngineError for a missing, unknown or ill-shaped input."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SlotTokens:
    """Tokens to append to the sequence in `slot`, whose logits after the last `logits` of them are wanted.

    adapter  0: the model itself, else the number of an adapter that was kept apart; the same for all tokens of a sequence
    logits   more than 1 only for engines that can verify
    """

    slot: int
    tokens: Sequence[int]
    adapter: int = 0
    logits: int = 1


class GenerationEngine(Protocol):
    """A loaded causal language model that owns its KV cache; sequences live in numbered slots.

    The scheduler above decides which slot advances by how many tokens; prompts may come in chunks, and a step may hold one chunk of a
    prompt or one token of each of many running sequences.

    can_verify  logits after several tokens of a row can be had, and are to the bit those of the same tokens given one by one
    adapters    names of the adapters kept apart; number 1 is the first
    """

    vocabulary: int
    slots: int
    context_tokens: int
    provider: str
    can_verify: bool
    adapters: Tuple[str, ...]

    def length(self, slot: int) -> int:
        """Tokens now held in the cache of `slot`."""
        ...

    def step(self, batch: Sequence[SlotTokens]) -> np.ndarray:
        """Append tokens, return float32 logits [sum of `logits`, vocabulary], row after row. Raises EngineError on overflow."""
        ...

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of `slot`; 0 frees it."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of `target`'s cache those of `source` (a shared prefix)."""
        ...

    def close(self) -> None: ...


# The artefact in a folder says which runtime opens it; the first that is there wins.
ENGINES: Dict[str, str] = {
    "model.native": "models.engines.native",
    "model.plan": "models.engines.tensorrt",
    "model.onnx": "models.engines.onnx",
}


def open_engine(folder: Path, options: Optional[EngineOptions] = None) -> Engine:
    """Open the artefact in `folder` as a stateless engine. Raises EngineError, also for files that are not those published."""
    engine: Engine = _runtime(folder).open_engine(folder, options or EngineOptions())
    return engine


def open_generation_engine(folder: Path, options: Optional[EngineOptions] = None) -> GenerationEngine:
    """Open a converted causal language model (an artefact and generation.json) with its KV cache. Raises EngineError."""
    engine: GenerationEngine = _runtime(folder).open_generation_engine(folder, options or EngineOptions())
    return engine


def _runtime(folder: Path) -> Any:
    artefact = next((name for name in ENGINES if (folder / name).is_file()), None)
    if artefact is None:
        raise EngineError(f"an engine in {folder} does not exist: it has neither {' nor '.join(ENGINES)}; convert the model first")
    damage = damage_of(folder)
    if damage is not None:
        raise EngineError(f"the engine in {folder} {damage}; convert the model again")
    return importlib.import_module(ENGINES[artefact])
