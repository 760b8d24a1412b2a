"""One build from request to published engine: convert, compare, publish; nothing of it is visible before it is whole.

Always run in a process of its own (`converters/__main__.py`): a build takes long, eats memory, and reads files that nobody vouches for.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters import decoder_line, native_line, stateless_line
from converters.calibration_digest import calibration_digest
from converters.decoder_graph import Progress
from converters.errors import BadSource, ConversionError, unsupported
from converters.gate_inputs import calibration_of
from converters.ladder import Place, Step, asked_precision, ladder, native_ladder, share_of
from converters.line import Job, Kind, Line
from converters.memory import require_memory, workspace_bytes
from converters.place import place_of
from converters.request import BuildRequest
from converters.verdict import Attempt, Status, Verdict, versions
from models.durable import sha256_of
from models.engine_record import EngineKey, StoredEngine
from models.engines import EngineError
from models.engines.free_memory import available_bytes
from models.manifest import GenerationManifest, manifest_digest
from models.store import TIMING_FOLDER, Store, open_store

# Another process may be building the same engine; its result is then ours.
BUILD_WAIT_S = 3600.0
# The attempts take this part of a build's time, in fractions of the whole.
FIRST, LAST = 0.02, 0.96

log = logging.getLogger(__name__)

Report = Callable[[str, float, str], None]
Kinds = Mapping[tuple[str, str], Kind]

_STATELESS = Kind(stateless_line.StatelessLine, stateless_line.converters, copies=5.0)
_DECODER = Kind(
    lambda job: native_line.NativeLine(job) if job.place.runtime == "native" else decoder_line.DecoderLine(job),
    lambda place: native_line.converter() if place.runtime == "native" else decoder_line.converters(place),
    copies=1.5,
)
KINDS: Kinds = {
    ("gguf", "generation"): _DECODER,
    ("transformers", "generation"): _DECODER,
    ("transformers", "embedding"): _STATELESS,
    ("transformers", "classification"): _STATELESS,
    ("transformers", "detection"): _STATELESS,
    ("onnx", "embedding"): _STATELESS,
    ("onnx", "classification"): _STATELESS,
    ("onnx", "detection"): _STATELESS,
}
# They trace the models without state; decoders are written from their weights without them.
EXPORTERS = ("torch", "transformers")
# What is wrong with the source or with this machine is wrong at every precision; anything else ends one step of the ladder.
ENDS_THE_LADDER = frozenset(
    ("bad_request", "no_memory", "no_space", "no_device", "no_profile", "parse", "unsupported_operator", "cancelled")
)


@dataclass(frozen=True)
class Built:
    engine: StoredEngine
    is_reused: bool
    seconds: float


def build(request: BuildRequest, report: Report, kinds: Kinds = KINDS) -> Built:
    """The engine of a request, built unless the store has it. `report` gets phase, fraction of the whole build, message.

    Raises ConversionError, StoreError, OSError.
    """
    start = time.monotonic()
    store = open_store(request.store)
    report("read", 0.0, f"sources of {request.manifest.name}")
    kind = _kind(request, kinds)
    place = place_of(request.options)
    steps = _steps(request, place)
    key = engine_key(request, store, kind, place, steps[0])
    with store.lock(f"build-{key.digest()}", BUILD_WAIT_S):
        engine = store.find_engine(key)
        is_reused = engine is not None
        if engine is None:
            engine = _build(request, kind, place, steps, key, store, report)
        elif not engine.record.verdict.get("passed") and not request.options.accept_unverified:
            raise _not_verified(request.manifest.name, str(engine.record.verdict.get("reason")), engine.record.verdict)
    report("done", 1.0, str(engine.folder))
    return Built(engine, is_reused, round(time.monotonic() - start, 3))


def engine_key(request: BuildRequest, store: Store, kind: Kind, place: Place, first: Step) -> EngineKey:
    """Everything that the result depends on. `precision` is where the ladder begins: where it ended is the verdict's to say.

    Reads the sources, except blobs of the store, whose names are their digests.
    """
    blobs = store.blob_path("0").parent
    calibration = calibration_of(request)
    provider = {} if place.provider == "cpu" else {"provider": place.provider, "tensorrt": place.tensorrt}
    options = {
        **provider,
        "l4t": place.l4t,
        "calibration": "" if calibration is None else calibration_digest(calibration),
        "keeps_fp32": "+".join(first.keeps_fp32),
    }
    return EngineKey(
        model=request.manifest.name,
        manifest=manifest_digest(request.manifest),
        sources={role: path.name if path.parent == blobs else sha256_of(path) for role, path in request.sources.items()},
        converter=kind.converters(place),
        runtime=place.runtime,
        runtime_version=place.version,
        device=place.device,
        precision=first.precision,
        options={name: value for name, value in options.items() if value},
    )


def _kind(request: BuildRequest, kinds: Kinds) -> Kind:
    manifest = request.manifest
    kind = kinds.get((manifest.format, manifest.task))
    if kind is None:
        known = ", ".join(f"{source} for {task}" for source, task in kinds)
        raise unsupported(f"{manifest.name}: {manifest.format} for {manifest.task} is not converted here; supported are {known}")
    return kind


def _steps(request: BuildRequest, place: Place) -> tuple[Step, ...]:
    manifest = request.manifest
    activations = manifest.generation.activations if isinstance(manifest, GenerationManifest) else "float32"
    asked, own = request.options.precision, manifest.build.precision
    if not place.can_run_here and not request.options.accept_unverified:
        raise ConversionError(
            f"{manifest.name}: an engine of {place.runtime} {place.version} cannot run here ({place.reason or 'no device'}), "
            "so it cannot be proven to be the model; build it where it will run, or say accept_unverified",
            "not_verified",
        )
    if place.runtime == "native":
        return native_ladder(asked, own, activations, native_line.is_rounded(request))
    return ladder(place, asked_precision(place, manifest.task, asked, own, activations), manifest.task)


def _build(
    request: BuildRequest, kind: Kind, place: Place, steps: tuple[Step, ...], key: EngineKey, store: Store, report: Report
) -> StoredEngine:
    name = request.manifest.name
    size = sum(path.stat().st_size for path in request.sources.values())
    # A copy to compare with, the result and its forerunners, and what they may be larger.
    store.require_space((4 if place.is_tensorrt else 3) * size, f"converting {name}")
    free = available_bytes()
    require_memory(name, size, kind.copies, free)
    with store.temporary() as temporary:
        folder, scratch = temporary / "engine", temporary / "scratch"
        scratch.mkdir()
        timing_cache = store.root / TIMING_FOLDER / f"{place.runtime}.cache"
        line = kind.open(Job(request, place, scratch, timing_cache, workspace_bytes(free, request.options.workspace_share)))
        verdict = Verdict(request.manifest.task, steps[0].precision, tuple(_walk(line, place, steps, folder, report)))
        if not verdict.passed:
            _refuse_or_accept(request, verdict)
        report("publish", LAST, f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB")
        tools = versions(EXPORTERS if kind is _STATELESS and request.manifest.format == "transformers" else ())
        tools |= {place.runtime: place.version} if place.is_tensorrt else {}
        engine = store.publish_engine(key, folder, verdict.to_json(), tools)
    log.info("built %s in %s", name, engine.folder)
    return engine


def _walk(line: Line, place: Place, steps: tuple[Step, ...], folder: Path, report: Report) -> list[Attempt]:
    """The attempts down to the first that need not be followed by another; `folder` holds the engine of the last."""
    attempts: list[Attempt] = []
    for index, step in enumerate(steps):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        begin, end = (FIRST + (LAST - FIRST) * share for share in share_of(index, len(steps)))
        try:
            attempt = _attempt(line, place, step, folder, begin, end, report)
        except ConversionError as error:
            if isinstance(error, BadSource) or error.code in ENDS_THE_LADDER or (step == steps[-1] and not attempts):
                raise
            if step == steps[-1]:
                raise ConversionError(f"{_tried(attempts)}; {step.name}: {error}", error.code) from error
            attempt = Attempt(step.name, "failed", str(error), {}, {}, 0, 0.0)
        attempts.append(attempt)
        if attempt.status != "failed":
            break
        log.warning("%s is refused: %s", step.name, attempt.reason)
    return attempts


def _attempt(line: Line, place: Place, step: Step, folder: Path, begin: float, end: float, report: Report) -> Attempt:
    start = time.monotonic()
    # A plan takes minutes to build, a graph is written in seconds and then compared.
    between = begin + (end - begin) * (0.8 if place.is_tensorrt else 0.4)
    notes = line.convert(step, folder, _part(report, "convert", step, begin, between))
    if not place.can_run_here:
        reason = f"not run: {place.reason or 'no device here can run it'}"
        return Attempt(step.name, "not run", reason, {}, {}, 0, round(time.monotonic() - start, 3), notes=notes)
    try:
        found = line.compare(step, folder, _part(report, "verify", step, between, end))
    except EngineError as error:
        return Attempt(step.name, "failed", str(error), {}, {}, 0, round(time.monotonic() - start, 3), notes=notes)
    worst = None
    if not found.passed:
        report("verify", round(end, 4), f"{step.name}: {found.reason}; looking for the tensor")
        worst = line.worst(step)
    reason = found.reason if worst is None else f"{found.reason}; first at {worst.name} ({worst.operator})"
    seconds = round(time.monotonic() - start, 3)
    status: Status = "passed" if found.passed else "failed"
    return Attempt(step.name, status, reason, found.figures, found.tolerance, found.inputs, seconds, worst, notes, found.own_inputs)


def _refuse_or_accept(request: BuildRequest, verdict: Verdict) -> None:
    name = request.manifest.name
    if request.options.accept_unverified:
        log.warning("%s is published although it is not proven to be the model: %s", name, verdict.last.reason)
        return
    raise ConversionError(
        f"{name}: the result is not the model it was made from: {_tried(verdict.attempts)}; nothing was published: report this with the "
        "file's sha256, or widen the tolerance in its manifest",
        "not_the_same_model",
        verdict.to_json(),
    )


def _tried(attempts: Sequence[Attempt]) -> str:
    return "; ".join(f"{attempt.precision}: {attempt.reason}" for attempt in attempts)


def _not_verified(name: str, reason: str, verdict: Mapping[str, object]) -> ConversionError:
    return ConversionError(
        f"{name}: the store has this engine, but it is not proven to be the model: {reason}; "
        f"say accept_unverified, or remove it (`hotspare models rm {name}`) and build again",
        "not_verified",
        verdict,
    )


def _part(report: Report, phase: str, step: Step, start: float, end: float) -> Progress:
    def tell(fraction: float, message: str) -> None:
        report(phase, round(start + (end - start) * min(max(fraction, 0.0), 1.0), 4), f"{step.name}: {message}")

    return tell
