"""The line of models without state: ONNX or an export, optimised, rounded, as an engine, compared with the source as it came."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from converters import (
    folded_onnx,
    half_from_onnx,
    int8_from_onnx,
    onnx_from_onnx,
    onnx_from_transformers,
    plain_from_quantised,
    plan_process,
)
from converters.beside import BESIDE, copy_beside
from converters.calibration import calibration_inputs
from converters.decoder_graph import Progress
from converters.engine_process import EngineProcess
from converters.errors import BadSource, ConversionError
from converters.gate_inputs import calibration_of, pictures_of, texts_of
from converters.graph_contract import Stateless
from converters.ladder import Place, Step
from converters.line import Job
from converters.plan_process import build_plan
from converters.probing_plan import MAX_BUILD_S, worst_in_plan
from converters.profiles import profiles_of
from converters.verdict import Comparison, WorstTensor
from converters.verify_onnx import open_source, verify_detection, verify_encoder
from converters.worst_tensor import worst_tensor
from models.engines import Engine, EngineOptions, open_engine
from models.manifest import DetectionManifest, GenerationManifest
from models.store import CALIBRATION_FOLDER, PROVIDER_FOLDER

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How a graph is rounded. `inputs`: representative ones; `cache`: a folder that keeps what was measured on them."""

    manifest: Stateless
    step: Step
    is_for_cpu: bool
    inputs: Callable[[], Sequence[Mapping[str, NDArray[Any]]]]
    cache: Path
    threads: int


# (graph of ONNX's own operators in float32, file to write, recipe) → notes for the record
Rounding = Callable[[Path, Path, Recipe], Mapping[str, Any]]


def round_to_half(source: Path, target: Path, recipe: Recipe) -> Mapping[str, Any]:
    half = half_from_onnx.half_from_onnx(source, target, recipe.manifest.build.keeps_fp32, with_attention=bool(recipe.step.keeps_fp32))
    return {"nodes": half.nodes, "halved": half.halved}


def round_to_int8(source: Path, target: Path, recipe: Recipe) -> Mapping[str, Any]:
    build = recipe.manifest.build
    form: int8_from_onnx.Form = "unsigned" if recipe.is_for_cpu else "signed"
    rounded = int8_from_onnx.int8_from_onnx(
        source,
        target,
        recipe.inputs(),
        build.ranges,
        excluded=(*build.keeps_fp32, *build.not_int8),
        form=form,
        cache=recipe.cache,
        threads=recipe.threads,
    )
    notes = {"int8_nodes": rounded.nodes, "int8_candidates": rounded.candidates}
    if recipe.is_for_cpu or not recipe.step.is_typed:
        return notes
    half = half_from_onnx.half_from_onnx(target, target, build.keeps_fp32, peaks=rounded.peaks)
    return {**notes, "nodes": half.nodes, "halved": half.halved}


ROUNDINGS: Mapping[str, Rounding] = {"fp16": round_to_half, "int8": round_to_int8}


class StatelessLine:
    def __init__(self, job: Job, roundings: Mapping[str, Rounding] = ROUNDINGS) -> None:
        manifest = job.request.manifest
        if isinstance(manifest, GenerationManifest):
            raise ConversionError(f"{manifest.name} generates: it has a line of its own", "bad_request")
        self._job = job
        self._manifest: Stateless = manifest
        self._roundings = roundings
        self._calibration = calibration_of(job.request)
        self._tokenizer = job.request.sources.get("tokenizer")
        self._source: Path | None = None
        self._standard: Path | None = None
        self._candidate: Path | None = None
        self._plan_request: dict[str, Any] = {}
        self._plan_s = 0.0
        self._feeds: tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]] = ({}, {})

    def convert(self, step: Step, folder: Path, progress: Progress) -> Mapping[str, Any]:
        copy_beside(self._job.request, folder)
        if self._job.place.is_tensorrt:
            return self._plan(step, folder, progress)
        target = folder / "model.onnx"
        self._candidate = target
        if self._job.place.provider != "cpu":
            return self._for_provider(step, target, progress)
        if step.precision not in self._roundings:
            progress(0.1, "check and optimise the graph")
            self._write_graph(folder, onnx_from_onnx.ONNXRUNTIME)
            return {}
        progress(0.1, "check the graph")
        standard = self._standard_graph(onnx_from_onnx.GraphTarget(is_standard=True))
        progress(0.5, f"round to {step.name}")
        return self._round(step, standard, target)

    def compare(self, step: Step, folder: Path, progress: Progress) -> Comparison:
        progress(0.0, "the same inputs through source and engine")
        options = self._job.request.options
        if self._source is None:
            raise ConversionError("nothing was converted yet", "bad_request")
        source = open_source(self._source, options.threads)
        try:
            if self._job.place.is_tensorrt or self._job.place.provider != "cpu":
                with EngineProcess(options.python, folder, self._manifest.task, self._opened_with(step, folder)) as process:
                    return self._compare(step, source, process, folder)
            result = open_engine(folder, EngineOptions(threads=options.threads))
            try:
                return self._compare(step, source, result, folder)
            finally:
                result.close()
        finally:
            source.close()

    def worst(self, step: Step) -> WorstTensor | None:
        if self._source is None or self._candidate is None or not all(self._feeds):
            return None
        # Of the source as it was exported many values are gone in a graph that was folded.
        source = self._standard if self._standard is not None else self._source
        options, found = self._job.request.options, None
        if self._candidate != source:
            found = worst_tensor(source, self._candidate, self._feeds, step.precision, options.threads)
        if found is None and self._plan_request and self._plan_s < MAX_BUILD_S:
            scratch = self._job.scratch
            found = worst_in_plan(options.python, self._plan_request, source, self._feeds, step.precision, scratch, options.threads)
        return found

    def _compare(self, step: Step, source: Engine, result: Engine, folder: Path) -> Comparison:
        kept = _Kept(source), _Kept(result)
        try:
            if isinstance(self._manifest, DetectionManifest):
                return verify_detection(self._manifest, *kept, pictures_of(self._calibration))
            has_profiles = self._job.place.is_tensorrt or self._job.place.provider == "tensorrt"
            rows = self._manifest.build.batch_max if has_profiles else 0
            return verify_encoder(self._manifest, *kept, self._tokenizer, texts_of(self._calibration), step.precision, rows)
        finally:
            self._feeds = kept[0].first, kept[1].first

    def _for_provider(self, step: Step, target: Path, progress: Progress) -> Mapping[str, Any]:
        """A graph that a provider makes its own engine of: fused operators of ONNX Runtime would fall back to its CPU."""
        progress(0.1, "check the graph")
        standard = self._standard_graph(onnx_from_onnx.tensorrt_target("tensorrt", self._job.place.tensorrt))
        notes: Mapping[str, Any] = {}
        if step.precision in self._roundings:
            progress(0.5, f"round to {step.name}")
            notes = self._round(step, standard, target)
        else:
            copy_graph(standard, target.parent)
        return {**notes, "opened_with": self._provider_options(step, target)}

    def _opened_with(self, step: Step, folder: Path) -> EngineOptions:
        """As the worker will open it (agent/engine_options.py)."""
        place, options = self._job.place, self._job.request.options
        if place.provider == "cpu":
            return EngineOptions()
        cache = str(self._job.request.store / PROVIDER_FOLDER) if place.provider == "tensorrt" else ""
        return EngineOptions(threads=options.threads, cache_folder=cache, **self._provider_options(step, folder / "model.onnx"))

    def _provider_options(self, step: Step, graph: Path) -> dict[str, Any]:
        """Fields of EngineOptions that are proven together with the graph."""
        made: dict[str, Any] = {"provider": self._job.place.provider, "precision": step.precision}
        if self._job.place.provider == "tensorrt":
            profiles = profiles_of(input_shapes(graph), self._manifest)
            made["workspace_bytes"] = self._job.workspace_bytes
            made["profiles"] = {name: tuple(map(tuple, shapes)) for profile in profiles for name, shapes in profile.items()}
        return made

    def _plan(self, step: Step, folder: Path, progress: Progress) -> Mapping[str, Any]:
        place, build, options = self._job.place, self._manifest.build, self._job.request.options
        progress(0.0, "check and optimise the graph")
        graph = self._candidate = self._standard_graph(onnx_from_onnx.tensorrt_target(place.runtime, place.version))
        notes: dict[str, Any] = {}
        precision: str = step.precision
        pinned = list(build.keeps_fp32)
        # Ranges of int8 are in the graph whatever the builder understands; half precision only for one that reads types.
        if step.precision in self._roundings and (step.is_typed or step.precision == "int8"):
            progress(0.05, f"round to {step.name}")
            rounded = self._job.scratch / f"{step.name.replace(' ', '_')}.onnx"
            notes.update(self._round(step, graph, rounded))
            graph = self._candidate = rounded
            precision = "typed" if step.is_typed else step.precision
        if not step.is_typed and step.keeps_fp32:
            pinned += half_from_onnx.fp32_nodes(graph, with_attention=True)
        request = {
            "module": place.runtime,
            "onnx": str(graph),
            "plan": str(folder / "model.plan"),
            "profiles": profiles_of(input_shapes(graph), self._manifest),
            "precision": precision,
            "fp32_layers": pinned if not step.is_typed and step.precision in ("fp16", "int8") else [],
            "workspace_bytes": self._job.workspace_bytes,
            "timing_cache": str(self._job.timing_cache),
            **plan_process.wishes(build),
        }
        built = build_plan(options.python, request, lambda fraction, message: progress(0.1 + 0.9 * fraction, message))
        self._plan_request, self._plan_s = request, float(built["seconds"])
        return {**notes, **built}

    def _round(self, step: Step, source: Path, target: Path) -> Mapping[str, Any]:
        request = self._job.request
        recipe = Recipe(
            self._manifest,
            step,
            not self._job.place.is_tensorrt and self._job.place.provider == "cpu",
            lambda: calibration_inputs(self._manifest, source, self._calibration, self._tokenizer, threads=request.options.threads),
            request.store / CALIBRATION_FOLDER,
            request.options.threads,
        )
        return self._roundings[step.precision](source, target, recipe)

    def _standard_graph(self, target: onnx_from_onnx.GraphTarget) -> Path:
        """The source in ONNX's own operators, for builders that know no others and for rounding."""
        if self._standard is None:
            folder = self._job.scratch / "standard"
            folder.mkdir()
            self._standard = self._write_graph(folder, target)
        return self._standard

    def _imported(self) -> tuple[Path, dict[str, Path]]:
        """The source as ONNX, and the files beside it that it refers to."""
        request = self._job.request
        if self._manifest.format == "onnx":
            return request.model, request.companions
        folder = self._job.scratch / "exported"
        model = folder / "model.onnx"
        if not model.exists():
            folder.mkdir(exist_ok=True)
            files = request.named(lambda role: role not in BESIDE)
            onnx_from_transformers.onnx_from_transformers(
                files, self._manifest, model, onnx_from_transformers.OPSET, lambda fraction, message: None
            )
        return model, {path.name: path for path in folder.iterdir() if path != model}

    def _write_graph(self, folder: Path, target: onnx_from_onnx.GraphTarget) -> Path:
        laid_out = self._job.scratch / f"source_{folder.name}"
        shutil.rmtree(laid_out, ignore_errors=True)
        laid_out.mkdir()
        try:
            model, companions = self._imported()
            self._source = onnx_from_onnx.onnx_from_onnx(model, companions, laid_out, folder, self._manifest, target)
        except ConversionError as error:
            raise BadSource(str(error), error.code, error.verdict) from error
        return folder / "model.onnx"


def copy_graph(graph: Path, folder: Path) -> None:
    """model.onnx with the weights beside it."""
    for path in graph.parent.glob(f"{graph.name}*"):
        shutil.copyfile(path, folder / path.name)


class _Kept:
    """An engine that keeps the first inputs it was given: with them the graphs are compared value by value."""

    def __init__(self, engine: Engine) -> None:
        self.inputs, self.outputs, self.provider = engine.inputs, engine.outputs, engine.provider
        self.first: dict[str, NDArray[Any]] = {}
        self._engine = engine

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if not self.first:
            self.first = {name: np.array(value) for name, value in inputs.items()}
        return self._engine.run(inputs)

    def close(self) -> None:
        self._engine.close()


def input_shapes(graph: Path) -> dict[str, list[int]]:
    """Name → sizes of a graph's inputs, 0 where they are open."""
    model = onnx.load(str(graph), load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    found = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input if value.name not in weights}
    return {name: [size.dim_value for size in sizes] for name, sizes in found.items()}


def converters(place: Place) -> str:
    """For the engine key."""
    parts = (onnx_from_transformers, onnx_from_onnx, folded_onnx, plain_from_quantised, half_from_onnx, int8_from_onnx)
    own = "+".join(f"{part.__name__.split('.')[-1]}/{part.VERSION}" for part in parts)
    return f"{own}+{plan_process.converter()}" if place.is_tensorrt else own
