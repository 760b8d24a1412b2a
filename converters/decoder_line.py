"""The line of causal language models: the weights of a file as a graph, compared with a numpy float32 reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converters import onnx_from_gguf
from converters.beside import copy_beside
from converters.decoder import Decoder
from converters.decoder_graph import Progress
from converters.decoder_source import DecoderSource
from converters.errors import ConversionError, unsupported
from converters.ladder import Place, Step
from converters.line import Job
from converters.onnxruntime_operators import Activations
from converters.verdict import Comparison, WorstTensor
from converters.verify_generation import verify_generation
from models.manifest import Generation, GenerationManifest

# (file, folder to write into, activations, progress, context) → the weights and the facts of what was written
Writer = Callable[[Path, Path, Activations, Progress, int], tuple[DecoderSource, Decoder]]

WRITERS: Mapping[str, Writer] = {"gguf": onnx_from_gguf.onnx_from_gguf}
ACTIVATIONS: Mapping[str, Activations] = {"fp32": "float32", "int8": "int8"}


class DecoderLine:
    def __init__(self, job: Job, writers: Mapping[str, Writer] = WRITERS) -> None:
        manifest = job.request.manifest
        if not isinstance(manifest, GenerationManifest):
            raise ConversionError(f"{manifest.name} does not generate: it has a line of its own", "bad_request")
        if job.place.is_tensorrt:
            raise unsupported(f"{manifest.name}: decoders are not built for {job.place.runtime} yet; take onnxruntime")
        self._job = job
        self._facts: Generation = manifest.generation
        self._write = writers[manifest.format]
        self._written: tuple[DecoderSource, Decoder] | None = None

    def convert(self, step: Step, folder: Path, progress: Progress) -> Mapping[str, Any]:
        request = self._job.request
        self._written = self._write(request.model, folder, ACTIVATIONS[step.precision], progress, self._facts.context_tokens)
        copy_beside(request, folder)
        return {}

    def compare(self, step: Step, folder: Path, progress: Progress) -> Comparison:
        if self._written is None:
            raise ConversionError("nothing was converted yet", "bad_request")
        threads = self._job.request.options.threads
        return verify_generation(*self._written, folder, ACTIVATIONS[step.precision], self._facts.mean_kl, threads, progress)

    def worst(self, step: Step) -> WorstTensor | None:
        return None


def converters(place: Place) -> str:
    """For the engine key."""
    return f"onnx_from_gguf/{onnx_from_gguf.VERSION}"
