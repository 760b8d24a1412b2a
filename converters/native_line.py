"""The line of causal language models to the native engine: one attempt, compared with the same reference as every other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters import native_from_causal_model
from converters.beside import copy_beside
from converters.decoder_graph import Progress
from converters.decoder_line import read_model, with_bits
from converters.errors import ConversionError, unsupported
from converters.gate_inputs import calibration_of, texts_of
from converters.gguf import read_gguf
from converters.ladder import Step
from converters.line import Job
from converters.lora import adapter_files
from converters.onnxruntime_operators import Activations
from converters.request import BuildRequest
from converters.verdict import Comparison, WorstTensor
from converters.verify_generation import compare_generation
from models.engines import EngineOptions, SlotTokens, open_generation_engine
from models.engines.native import NativeGenerationEngine
from models.manifest import GenerationManifest

# With the weights as they are and activations of 15 bits: SmolLM2 was measured at 9e-7.
EXACT_MEAN_KL = 1e-4


class NativeLine:
    def __init__(self, job: Job) -> None:
        manifest = job.request.manifest
        if not isinstance(manifest, GenerationManifest):
            raise ConversionError(f"{manifest.name} does not generate: the native engine is for decoders", "bad_request")
        if any(adapter_files(job.request.sources)):
            raise unsupported(f"{manifest.name} has LoRA adapters, which the native engine does not know; take onnxruntime")
        self._job = job
        self._facts = manifest.generation
        self._model = read_model(job, self._facts.context_tokens)

    def convert(self, step: Step, folder: Path, progress: Progress) -> Mapping[str, Any]:
        # What is to have eight bits the engine's own form rounds, with scales of half the size.
        model = with_bits(self._model, step.precision) if step.precision == "int4" else self._model
        activations: Activations = "int8" if step == Step("int8") else "float32"
        rounded = native_from_causal_model.native_from_causal_model(model, folder, progress, activations, step.precision == "fp32")
        copy_beside(self._job.request, folder)
        return {"compiler": native_from_causal_model.compiler_version(), "rounded": rounded}

    def compare(self, step: Step, folder: Path, progress: Progress) -> Comparison:
        decoder = self._model.decoder
        options = EngineOptions(
            threads=self._job.request.options.threads, slots=1, context_tokens=min(self._facts.context_tokens, decoder.context_tokens)
        )
        mean_kl = min(self._facts.mean_kl, EXACT_MEAN_KL) if step.precision == "fp32" else self._facts.mean_kl
        engine = open_generation_engine(folder, options)
        if not isinstance(engine, NativeGenerationEngine):
            raise ConversionError(f"{folder} holds no native engine", "internal")
        try:
            opened = _Session(engine)
            own = texts_of(calibration_of(self._job.request))
            return compare_generation(self._model.source, decoder, folder, lambda _: opened, mean_kl, False, progress, own)
        finally:
            engine.close()

    def worst(self, step: Step) -> WorstTensor | None:
        return None


class _Session:
    """The first slot of the engine, all positions at once."""

    def __init__(self, engine: NativeGenerationEngine) -> None:
        self._engine = engine

    def step(self, ids: Sequence[Sequence[int]], lengths: Sequence[int], num_logits: int = 1) -> NDArray[np.float32]:
        (tokens,), (held,) = ids, lengths
        self._engine.truncate(0, held)
        return self._engine.all_logits(SlotTokens(0, tokens))[None, -num_logits:]


def is_rounded(request: BuildRequest) -> bool:
    """Does the native engine round weights of this source? Plain ones and blocks narrower than its own."""
    if request.manifest.format != "gguf":
        return True
    return bool(native_from_causal_model.rounded_formats(read_gguf(request.model)))


def converter() -> str:
    """For the engine key."""
    return f"native_from_causal_model/{native_from_causal_model.VERSION}"
