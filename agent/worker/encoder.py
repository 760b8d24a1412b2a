"""Text encoders in the worker: embeddings and class logits, a bounded piece of a request per step."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from agent.worker.loop import Emit, Refusal
from agent.worker_protocol import Cancel, CloseModel, Done, Encode, Failed, OpenModel
from models.engines import Engine, EngineError, EngineOptions, open_engine
from models.manifest import ClassificationManifest, EmbeddingManifest, manifest_from_mapping
from models.record import from_mapping
from models.tasks.classification import classify
from models.tasks.embedding import embed

EncoderManifest = Union[EmbeddingManifest, ClassificationManifest]

# Tokens of one step, padding included: what a text that is being generated beside it has to wait for.
STEP_TOKENS = 1024
WAITING = 64


class OpenEncoder:
    def __init__(self, manifest: EncoderManifest, engine: Engine) -> None:
        self.manifest = manifest
        self.engine = engine
        self.sequences = 0

    @property
    def rows_max(self) -> int:
        """Sequences of one run: TensorRT has kernels for as many as the manifest says; others take any."""
        return self.manifest.build.batch_max if self.engine.provider == "tensorrt" else WAITING * STEP_TOKENS

    def columns(self) -> int:
        if isinstance(self.manifest, EmbeddingManifest):
            return self.manifest.embedding.dimensions
        return len(self.manifest.classification.labels)

    def run(self, sequences: Sequence[Sequence[int]]) -> Tuple[np.ndarray, Tuple[int, ...]]:
        """(rows float32 [n, columns], indices of sequences that were cut)."""
        self.sequences += len(sequences)
        if isinstance(self.manifest, EmbeddingManifest):
            embeddings = embed(self.engine, self.manifest.embedding, sequences)
            return embeddings.vectors, embeddings.truncated
        classes = classify(self.engine, self.manifest.classification, sequences)
        return classes.logits, classes.truncated


class Job:
    """One request: its sequences, and the pieces of them that are still to do."""

    def __init__(self, message: Encode, sequences: List[np.ndarray], columns: int, rows_max: int) -> None:
        self.message = message
        self.sequences = sequences
        self.ends_at_s = time.monotonic() + message.deadline_s
        self.rows = np.zeros((len(sequences), columns), np.float32)
        self.truncated: List[int] = []
        self.pieces = pieces([len(tokens) for tokens in sequences], rows_max)


class EncoderService:
    handles: Tuple[Any, ...] = (OpenModel, CloseModel, Encode, Cancel)

    def __init__(self, emit: Emit, wake: Callable[[], None]) -> None:
        self._emit = emit
        self._models: Dict[str, OpenEncoder] = {}
        self._jobs: Deque[Job] = deque()  # at most WAITING; one more is refused

    def handle(self, message: Any, payload: bytes) -> None:
        if isinstance(message, Encode):
            self._add(message, payload)
        elif isinstance(message, OpenModel):
            self._open(message)
        elif isinstance(message, CloseModel):
            self._close(message.model)
            self._emit(Done(message.request))
        elif isinstance(message, Cancel):
            self._give_up(lambda job: job.message.request == message.target, "the request was cancelled")

    def step(self) -> bool:
        if self._jobs:
            job = self._jobs[0]
            failure = self._advance(job)
            if failure is not None:
                self._jobs.popleft()
                self._emit(failure)
            elif not job.pieces:
                self._jobs.popleft()
                result = {"columns": job.rows.shape[1], "truncated": sorted(job.truncated)}
                self._emit(Done(job.message.request, result), job.rows.astype("<f4", copy=False).tobytes())
            else:
                self._jobs.rotate(-1)  # a short request need not wait for a long one
        return bool(self._jobs)

    def status(self) -> Tuple[Dict[str, Dict[str, Any]], Dict[str, Dict[str, Any]]]:
        models = {
            name: {
                "task": model.manifest.task,
                "provider": model.engine.provider,
                "columns": model.columns(),
                "sequences": model.sequences,
                "waiting": sum(job.message.model == name for job in self._jobs),
            }
            for name, model in self._models.items()
        }
        return models, {}

    def close(self) -> None:
        for name in list(self._models):
            self._close(name)

    def _open(self, message: OpenModel) -> None:
        manifest = manifest_from_mapping(message.manifest)
        if not isinstance(manifest, (EmbeddingManifest, ClassificationManifest)):
            raise Refusal("invalid", f"model {message.model} has task {manifest.task!r}; the encoder embeds and classifies")
        engine = open_engine(Path(message.folder), from_mapping(EngineOptions, message.options))
        model, before = OpenEncoder(manifest, engine), self._models.get(message.model)
        _warm_up(model)
        if before is not None and before.columns() != model.columns():
            self._close(message.model)
        elif before is not None:
            before.engine.close()  # between two steps: jobs that are under way go on with the new one
        self._models[message.model] = model
        self._emit(Done(message.request, {"provider": engine.provider, "columns": model.columns()}))

    def _close(self, name: str) -> None:
        model = self._models.pop(name, None)
        if model is not None:
            self._give_up(lambda job: job.message.model == name, f"model {name} was closed")
            model.engine.close()

    def _add(self, message: Encode, payload: bytes) -> None:
        model = self._models.get(message.model)
        if model is None:
            raise Refusal("unknown_model", f"model {message.model} is not open; open are {', '.join(self._models) or 'none'}")
        if len(self._jobs) >= WAITING:
            raise Refusal("busy", f"{len(self._jobs)} requests wait for the encoder; try again later")
        if not message.lengths or min(message.lengths) < 1 or sum(message.lengths) * 4 != len(payload):
            raise Refusal(
                "invalid", f"the payload has {len(payload)} bytes, not those of {len(message.lengths)} sequences of 1 token or more"
            )
        sequences = np.split(np.frombuffer(payload, "<i4"), np.cumsum(message.lengths)[:-1])
        self._jobs.append(Job(message, sequences, model.columns(), model.rows_max))

    def _advance(self, job: Job) -> Optional[Failed]:
        if time.monotonic() > job.ends_at_s:
            return Failed(job.message.request, "deadline", "the sequences were not encoded before the deadline")
        indices = job.pieces.popleft()
        try:
            rows, truncated = self._models[job.message.model].run([job.sequences[index].tolist() for index in indices])
        except EngineError as error:
            return Failed(job.message.request, "engine", str(error))
        job.rows[list(indices)] = rows
        job.truncated.extend(indices[position] for position in truncated)
        return None

    def _give_up(self, is_meant: Callable[[Job], bool], why: str) -> None:
        for job in [job for job in self._jobs if is_meant(job)]:
            self._jobs.remove(job)
            self._emit(Failed(job.message.request, "cancelled", why))


def _warm_up(model: OpenEncoder) -> None:
    """The first pass reads weights from the disk and sets up kernels, and is nobody's to wait for."""
    try:
        model.run([[0]])
        model.sequences = 0
    except EngineError:
        model.engine.close()
        raise


def pieces(lengths: Sequence[int], rows_max: int, step_tokens: int = STEP_TOKENS) -> Deque[Tuple[int, ...]]:
    """Indices of at most `rows_max` sequences in groups of similar length, rows · longest row at most `step_tokens` unless one alone is
    longer."""
    groups: Deque[Tuple[int, ...]] = deque()
    group: List[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if group and (len(group) == rows_max or (len(group) + 1) * lengths[index] > step_tokens):
            groups.append(tuple(group))
            group = []
        group.append(index)
    if group:
        groups.append(tuple(group))
    return groups
