"""The line of causal language models: the weights of a file as a graph, compared with a numpy float32 reference."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters import onnx_from_causal_model, plan_process
from converters.beside import copy_beside
from converters.causal_model import CausalModel, model_from_gguf, model_from_transformers
from converters.decoder import Decoder
from converters.decoder_graph import Form, Progress
from converters.decoder_profiles import decoder_profiles
from converters.decoder_source import DecoderSource
from converters.engine_process import GenerationProcess
from converters.errors import ConversionError
from converters.gate_inputs import calibration_of, texts_of
from converters.ladder import Place, Rung, Step
from converters.line import Job
from converters.lora import Adapter, MergedSource, adapter_files, read_adapter
from converters.onnxruntime_operators import OnnxRuntimeForm
from converters.plan_process import build_plan
from converters.probing_plan import MAX_BUILD_S, worst_in_plan
from converters.quantised_source import QuantisedSource
from converters.standard_operators import KEEPS_FP32, StandardForm
from converters.verdict import Comparison, WorstTensor
from converters.verify_generation import EngineSession, Session, Stepping, compare_generation, verify_generation
from converters.worst_tensor import worst_tensor
from models.engines import EngineOptions, open_generation_engine
from models.manifest import Generation, GenerationManifest

# Tokens of a prompt that are computed at once.
PIECE_TOKENS = 256
# Above this a second graph, only to find a fault in, is too dear.
PROBE_BYTES = 2 << 30
BESIDE = ("tokenizer.json", "chat_template.jinja", "generation.json")

# (model, folder, form, progress, adapters kept apart): writes model.onnx and what lies beside it
Writer = Callable[[CausalModel, Path, Form, Progress, Sequence[Adapter]], None]


class DecoderLine:
    def __init__(self, job: Job, write: Writer = onnx_from_causal_model.onnx_from_causal_model) -> None:
        manifest = job.request.manifest
        if not isinstance(manifest, GenerationManifest):
            raise ConversionError(f"{manifest.name} does not generate: it has a line of its own", "bad_request")
        self._job = job
        self._facts: Generation = manifest.generation
        self._write = write
        self._model = read_model(job, self._facts.context_tokens)
        kept, merged = adapter_files(job.request.sources)
        for files in merged:
            adapter = read_adapter(files, self._model.source)
            source = MergedSource(self._model.source, self._model.decoder, adapter)
            self._model = dataclasses.replace(self._model, source=source)
        self._adapters = [read_adapter(files, self._model.source) for files in kept]
        self._candidate: Path | None = None
        self._own = texts_of(calibration_of(job.request))
        self._plan_request: dict[str, Any] = {}
        self._plan_s = 0.0

    def convert(self, step: Step, folder: Path, progress: Progress) -> Mapping[str, Any]:
        notes: Mapping[str, Any] = {}
        model = with_bits(self._model, step.precision)
        if self._job.place.is_tensorrt:
            notes = self._plan(step, model, folder, progress)
        else:
            self._write(model, folder, onnxruntime_form(step), progress, self._adapters)
            self._candidate = folder / "model.onnx"
        copy_beside(self._job.request, folder)
        return notes

    def compare(self, step: Step, folder: Path, progress: Progress) -> Comparison:
        request, decoder = self._job.request, self._model.decoder
        is_exact = step.precision == "fp32"
        if not self._job.place.is_tensorrt and not self._adapters:
            form = onnxruntime_form(step)
            activations = form.activations if is_exact else "int8"
            return verify_generation(
                self._model.source, decoder, folder, activations, self._facts.mean_kl, request.options.threads, progress, self._own
            )
        options = EngineOptions(
            threads=request.options.threads, slots=1, context_tokens=min(self._facts.context_tokens, decoder.context_tokens)
        )
        if self._job.place.is_tensorrt:
            with GenerationProcess(request.options.python, folder, "generation", options) as process:
                return self._compare(process, folder, is_exact, progress)
        engine = open_generation_engine(folder, options)
        try:
            return self._compare(engine, folder, is_exact, progress)
        finally:
            engine.close()

    def worst(self, step: Step) -> WorstTensor | None:
        source, decoder = self._model.source, self._model.decoder
        size = sum(4 * int(np.prod(source.shape(name))) for name in source.tensors)
        if self._candidate is None or self._adapters or size > PROBE_BYTES:
            return None
        folder = self._job.scratch / "exact"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        is_standard = self._job.place.is_tensorrt
        exact: Form = StandardForm("float32") if is_standard else OnnxRuntimeForm("float32")
        onnx_from_causal_model.onnx_from_causal_model(self._model, folder, exact, lambda fraction, message: None)
        number = np.float16 if is_standard and standard_form(step).compute == "float16" else np.float32
        feeds = probe_feeds(decoder, is_standard, np.float32), probe_feeds(decoder, is_standard, number)
        options = self._job.request.options
        found = worst_tensor(folder / "model.onnx", self._candidate, feeds, step.precision, options.threads)
        if found is None and self._plan_request and self._plan_s < MAX_BUILD_S:
            request, scratch = self._plan_request, self._job.scratch
            found = worst_in_plan(options.python, request, folder / "model.onnx", feeds, step.precision, scratch, options.threads)
        return found

    def _compare(self, engine: Stepping, folder: Path, is_exact: bool, progress: Progress) -> Comparison:
        """The model itself, then with each adapter; the first that fails decides, else the model itself is told."""
        found: list[Comparison] = []
        variants: list[tuple[str, DecoderSource]] = [("", self._model.source)]
        variants += [(each.name, MergedSource(self._model.source, self._model.decoder, each)) for each in self._adapters]
        for number, (name, source) in enumerate(variants):
            opened = partial(_as_it_is, EngineSession(engine, number))
            decoder, tolerance = self._model.decoder, self._facts.mean_kl
            compared = compare_generation(source, decoder, folder, opened, tolerance, is_exact, progress, self._own)
            if not compared.passed:
                return dataclasses.replace(compared, reason=f"adapter {name}: {compared.reason}" if name else compared.reason)
            found.append(compared)
        return dataclasses.replace(found[0], inputs=sum(each.inputs for each in found))

    def _plan(self, step: Step, model: CausalModel, folder: Path, progress: Progress) -> Mapping[str, Any]:
        place, build, options = self._job.place, self._job.request.manifest.build, self._job.request.options
        written = self._job.scratch / "standard"
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir()
        form = standard_form(step)
        self._write(model, written, form, lambda fraction, message: progress(0.1 * fraction, message), self._adapters)
        self._candidate = written / "model.onnx"
        for name in BESIDE:
            if (written / name).exists():
                shutil.copyfile(written / name, folder / name)
        is_flagged = not step.is_typed and step.precision == "fp16"
        precision = "typed" if step.is_typed and form.compute == "float16" else step.precision
        decoder = model.decoder
        request = {
            "module": place.runtime,
            "onnx": str(self._candidate),
            "plan": str(folder / "model.plan"),
            "profiles": decoder_profiles(decoder, self._facts.slots, self._facts.context_tokens, PIECE_TOKENS, bool(self._adapters)),
            "precision": precision,
            "fp32_layers": [*KEEPS_FP32, *build.keeps_fp32] if is_flagged else [],
            "workspace_bytes": self._job.workspace_bytes,
            "timing_cache": str(self._job.timing_cache),
            **plan_process.wishes(build),
        }
        built = build_plan(options.python, request, lambda fraction, message: progress(0.1 + 0.9 * fraction, message))
        self._plan_request, self._plan_s = request, float(built["seconds"])
        return built


def _as_it_is(session: Session, capacity: int) -> Session:
    """An engine was opened with the capacity that it is served with."""
    del capacity
    return session


def read_model(job: Job, context_tokens: int) -> CausalModel:
    request = job.request
    if request.manifest.format == "gguf":
        return model_from_gguf(request.model, context_tokens)
    adapters = ("adapter.", "merged.")
    return model_from_transformers(request.named(lambda role: not role.startswith(adapters)), context_tokens)


def with_bits(model: CausalModel, precision: Rung) -> CausalModel:
    """Plain weights as blocks of so many bits as were asked for; those of a GGUF are blocks already."""
    if precision not in ("int4", "int8"):
        return model
    return dataclasses.replace(model, source=QuantisedSource(model.source, 4 if precision == "int4" else 8))


def onnxruntime_form(step: Step) -> OnnxRuntimeForm:
    return OnnxRuntimeForm("int8" if step.precision == "int8" else "float32")


def standard_form(step: Step) -> StandardForm:
    """A builder with flags gets float32 and rounds by itself."""
    if not step.is_typed or step.precision in ("fp32", "tf32"):
        return StandardForm("float32")
    return StandardForm("float16", {"int4": (4, 8), "int8": (8,)}.get(step.precision, ()))


def probe_feeds(decoder: Decoder, is_standard: bool, number: Any) -> dict[str, NDArray[Any]]:
    """One row of a few tokens behind nothing, in either form of `decoder_graph.py`."""
    count = min(12, decoder.context_tokens - 1)
    ids = (np.arange(count)[None] * 7 + 3) % decoder.vocabulary
    if is_standard:
        past = np.zeros((1, 1, decoder.kv_heads, decoder.head_dim), number)
        feeds: dict[str, NDArray[Any]] = {"lengths": np.zeros(1, np.int32), "logits_at": np.array([[count - 1]], np.int32)}
        name = "past"
    else:
        past = np.zeros((1, decoder.kv_heads, count, decoder.head_dim), np.float32)
        feeds = {"seqlens_k": np.array([count - 1], np.int32), "total_sequence_length": np.array(count, np.int32)}
        feeds["num_logits"] = np.array(1, np.int64)
        name = "past_key_values"
    caches = {f"{name}.{layer}.{part}": past for layer in range(decoder.layers) for part in ("key", "value")}
    return {"input_ids": ids.astype(np.int64), **feeds, **caches}


def converters(place: Place) -> str:
    """For the engine key."""
    own = f"onnx_from_causal_model/{onnx_from_causal_model.VERSION}"
    return f"{own}+{plan_process.converter()}" if place.is_tensorrt else own
