"""One build from request to published engine: convert, verify, publish; nothing of it is visible before it is whole.

Always run in a process of its own (`converters/__main__.py`): a build takes long, eats memory, and reads files that nobody vouches for.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from converters import onnx_from_gguf, onnx_from_onnx
from converters.decoder_graph import Progress
from converters.errors import ConversionError, unsupported
from converters.graph_contract import Stateless
from converters.request import BuildRequest
from converters.verdict import Verdict, versions
from converters.verify_generation import verify_generation
from converters.verify_onnx import open_result, open_source, verify_detection, verify_encoder
from models.durable import sha256_of
from models.engine_record import EngineKey, StoredEngine
from models.manifest import DetectionManifest, GenerationManifest, manifest_digest
from models.store import Store, open_store

# Another process may be building the same engine; its result is then ours.
BUILD_WAIT_S = 3600.0
MAX_TOKENIZER_BYTES = 64 << 20

log = logging.getLogger(__name__)

Report = Callable[[str, float, str], None]


@dataclass(frozen=True)
class Built:
    engine: StoredEngine
    is_reused: bool
    seconds: float


def build(request: BuildRequest, report: Report) -> Built:
    """The engine of a request, built unless the store has it. `report` gets phase, fraction of the whole build, message.

    Raises ConversionError, StoreError, OSError.
    """
    start = time.monotonic()
    store = open_store(request.store)
    report("read", 0.0, f"sources of {request.manifest.name}")
    key = engine_key(request, store)
    with store.lock(f"build-{key.digest()}", BUILD_WAIT_S):
        engine = store.find_engine(key)
        is_reused = engine is not None
        if engine is None:
            engine = _build(request, key, store, report)
    report("done", 1.0, str(engine.folder))
    return Built(engine, is_reused, round(time.monotonic() - start, 3))


def engine_key(request: BuildRequest, store: Store) -> EngineKey:
    """Everything that the result depends on. Reads the sources, except blobs of the store, whose names are their digests."""
    manifest = request.manifest
    blobs = store.blob_path("0").parent
    converter = _CONVERTERS.get((manifest.format, manifest.task))
    if converter is None:
        known = ", ".join(f"{source} for {task}" for source, task in _CONVERTERS)
        raise unsupported(f"{manifest.name}: {manifest.format} for {manifest.task} is not converted here; supported are {known}")
    return EngineKey(
        model=manifest.name,
        manifest=manifest_digest(manifest),
        sources={role: path.name if path.parent == blobs else sha256_of(path) for role, path in request.sources.items()},
        converter=converter,
        runtime="onnxruntime",
        runtime_version=onnxruntime.__version__,
        device="cpu",
        precision=manifest.generation.activations if isinstance(manifest, GenerationManifest) else "float32",
    )


_CONVERTERS = {
    ("gguf", "generation"): f"onnx_from_gguf/{onnx_from_gguf.VERSION}",
    ("onnx", "embedding"): f"onnx_from_onnx/{onnx_from_onnx.VERSION}",
    ("onnx", "classification"): f"onnx_from_onnx/{onnx_from_onnx.VERSION}",
    ("onnx", "detection"): f"onnx_from_onnx/{onnx_from_onnx.VERSION}",
}


def _build(request: BuildRequest, key: EngineKey, store: Store, report: Report) -> StoredEngine:
    size = sum(path.stat().st_size for path in request.sources.values())
    # A copy to compare with, the result, and what the result may be larger.
    store.require_space(3 * size, f"converting {request.manifest.name}")
    with store.temporary() as temporary:
        folder, scratch = temporary / "engine", temporary / "scratch"
        folder.mkdir()
        scratch.mkdir()
        manifest = request.manifest
        if isinstance(manifest, GenerationManifest):
            verdict = _decoder(request, manifest, folder, report)
        else:
            verdict = _stateless(request, manifest, folder, scratch, report)
        if not verdict.passed:
            raise ConversionError(
                f"{request.manifest.name}: the result is not the model it was made from: {verdict.reason}; "
                "nothing was published: report this with the file's sha256, or widen the tolerance in its manifest",
                "not_the_same_model",
            )
        report("publish", 0.95, f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB")
        engine = store.publish_engine(key, folder, verdict.to_json(), versions())
    log.info("built %s in %s", request.manifest.name, engine.folder)
    return engine


def _decoder(request: BuildRequest, manifest: GenerationManifest, folder: Path, report: Report) -> Verdict:
    facts = manifest.generation
    gguf, decoder = onnx_from_gguf.onnx_from_gguf(
        request.model, folder, facts.activations, _part(report, "convert", 0.0, 0.4), facts.context_tokens
    )
    _beside(request, folder)
    progress = _part(report, "verify", 0.4, 0.95)
    return verify_generation(gguf, decoder, folder, facts.activations, facts.mean_kl, request.options.threads, progress)


def _stateless(request: BuildRequest, manifest: Stateless, folder: Path, scratch: Path, report: Report) -> Verdict:
    report("convert", 0.1, "check and optimise the graph")
    source = onnx_from_onnx.onnx_from_onnx(request.model, request.companions, scratch, folder, manifest)
    _beside(request, folder)
    report("verify", 0.4, "the same inputs through source and result")
    threads = request.options.threads
    original, result = open_source(source, threads), open_result(folder / "model.onnx", threads)
    if isinstance(manifest, DetectionManifest):
        return verify_detection(manifest, original, result)
    tokenizer = folder / "tokenizer.json"
    return verify_encoder(manifest, original, result, tokenizer if tokenizer.exists() else None)


# Roles that go into the engine's folder as they are; a file from the manifest wins over one from the GGUF.
_BESIDE = {"tokenizer": "tokenizer.json", "chat_template": "chat_template.jinja"}


def _beside(request: BuildRequest, folder: Path) -> None:
    for role, name in _BESIDE.items():
        if role in request.sources:
            size = request.sources[role].stat().st_size
            if size > MAX_TOKENIZER_BYTES:
                raise ConversionError(f"files.{role} of {request.manifest.name} has {size} bytes, more than {MAX_TOKENIZER_BYTES}")
            shutil.copyfile(request.sources[role], folder / name)


def _part(report: Report, phase: str, start: float, end: float) -> Progress:
    return lambda fraction, message: report(phase, round(start + (end - start) * fraction, 4), message)
