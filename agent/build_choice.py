"""Which engine is wanted on this machine, and which of those in the store can serve. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent.config import ConvertSettings
from agent.preparation import PreparationFailed, is_verified
from models.device import Device
from models.engine_record import EngineKey, StoredEngine, proven_provider
from models.engines.onnx_providers import PROVIDERS
from models.manifest import GenerationManifest, Manifest, Precision, manifest_digest
from models.runtimes import Runtimes

BuildTarget = Literal["onnxruntime", "native", "tensorrt", "tensorrt_rtx"]
Provider = Literal["cpu", "cuda", "tensorrt"]

# Where the workers' interpreter did not say what it has: what the daemon's own packages build, on the CPU.
UNKNOWN = Runtimes(python="", device=Device("cpu", "cpu", reason="the workers' interpreter did not answer"))


@dataclass(frozen=True, slots=True)
class Machine:
    """What engines can be built for here. `cpu`: in the words of native engines' keys; `has_compiler`: native ones can be built."""

    runtimes: Runtimes = UNKNOWN
    cpu: str = ""
    has_compiler: bool = False

    def version(self, runtime: str) -> str:
        found = getattr(self.runtimes, runtime, None)
        return "" if found is None else str(found.version)


@dataclass(frozen=True, slots=True)
class BuildChoice:
    """What `python -m converters build` is told of an engine (converters/request.py says what the fields mean)."""

    target: BuildTarget = "onnxruntime"
    precision: Precision = "auto"
    calibration: Path | None = None
    accept_unverified: bool = False
    provider: Provider = "cpu"

    @property
    def is_slow(self) -> bool:
        """Plans take minutes to an hour, made by us or by a provider; the others seconds to a minute."""
        return self.target.startswith("tensorrt") or self.provider == "tensorrt"


def choices(
    settings: ConvertSettings,
    order: Mapping[str, Any],
    machine: Machine,
    manifest: Manifest,
    calibration: Path | None = None,
    provider: Provider = "cpu",
) -> tuple[BuildChoice, ...]:
    """What is wanted, then what is taken where the first is not to be had. The order wins over the configuration; `calibration` is a path
    that somebody on this machine has named, where an order can only name an entry of the node's folder; `provider` is what ONNX Runtime
    is to serve models without state with: text is generated on its CPU.

    Raises PreparationFailed for a target, a provider or a calibration that this machine does not have.
    """
    calibration = calibration.absolute() if calibration is not None else _calibration(settings.calibration, order.get("calibration"))
    accepts = bool(settings.accept_unverified or order.get("accept_unverified"))
    precision: Precision = order.get("precision") or settings.precision
    target: BuildTarget | Literal["auto"] = order.get("target") or settings.target
    targets = _automatic(machine, manifest) if target == "auto" else (target,)
    for named in targets:
        if named.startswith("tensorrt") and not machine.version(named):
            why = machine.runtimes.problems.get(named) or "it is not installed there"
            raise PreparationFailed(f"the target is {named}, but worker.python cannot load it: {why}", "unsupported")
    own: Provider = "cpu" if isinstance(manifest, GenerationManifest) else provider
    if "onnxruntime" in targets and (missing := _missing(own, machine)):
        raise PreparationFailed(f"worker.provider is {own}, but {missing}; set it to cpu, or install what has it", "unsupported")
    return tuple(BuildChoice(each, precision, calibration, accepts, own if each == "onnxruntime" else "cpu") for each in targets)


def quick_choice(settings: ConvertSettings, order: Mapping[str, Any]) -> BuildChoice:
    """What is built in seconds and opens everywhere."""
    return BuildChoice(accept_unverified=bool(settings.accept_unverified or order.get("accept_unverified")))


def _automatic(machine: Machine, manifest: Manifest) -> tuple[BuildTarget, ...]:
    if machine.version("tensorrt") and machine.runtimes.device.kind == "cuda":
        return ("tensorrt",)
    if isinstance(manifest, GenerationManifest) and machine.has_compiler:
        return "native", "onnxruntime"
    return ("onnxruntime",)


def _missing(provider: Provider, machine: Machine) -> str:
    """What stands in the way of a provider; empty when nothing does."""
    onnx = machine.runtimes.onnxruntime
    has = onnx.providers if onnx is not None else ()
    if provider == "cpu" or PROVIDERS[provider][0] in has:
        return ""
    return f"ONNX Runtime of worker.python has only {', '.join(has)}" if has else "worker.python has no ONNX Runtime"


def _calibration(folder: Path | None, name: str | None) -> Path | None:
    """An order names an entry of the node's own folder and nothing else on the disk."""
    if name is None:
        return None
    if folder is None:
        raise PreparationFailed(f"calibration {name!r} needs convert.calibration, the folder that holds it", "unsupported")
    if "/" in name or name in ("", ".", ".."):
        raise PreparationFailed(f"calibration {name!r} is not the plain name of an entry of {folder}", "unsupported")
    return folder / name


def usable(
    engines: Iterable[StoredEngine], manifest: Manifest, sources: Mapping[str, str], choice: BuildChoice, machine: Machine
) -> list[StoredEngine]:
    """The engines of a model that may serve here now, the likest to what is wanted first. `sources`: role → digest, as far as known."""
    digest = manifest_digest(manifest)
    fit = [
        engine
        for engine in engines
        if engine.record.key.manifest == digest
        and all(engine.record.key.sources.get(role, known) == known for role, known in sources.items() if known)
        and opens_here(engine.record.key, machine)
        and (choice.accept_unverified or is_verified({"verdict": engine.record.verdict}))
    ]
    return sorted(fit, key=lambda engine: _likeness(engine, choice, machine), reverse=True)


def opens_here(key: EngineKey, machine: Machine) -> bool:
    """A plan runs on the TensorRT, the GPU and the L4T it was built with, native code on its CPU, a graph on the CPU of any ONNX Runtime.
    On a provider that uses the GPU it was proven with the kernels of one version there."""
    if key.runtime == "onnxruntime" and proven_provider(key) == "cpu":
        return True
    if key.runtime == "native":
        return key.device == machine.cpu
    device = machine.runtimes.device
    onnx = machine.runtimes.onnxruntime
    is_same = machine.version(key.runtime) == key.runtime_version and key.device == device.key
    if proven_provider(key) != "cpu":
        is_same = is_same and onnx is not None and key.options.get("tensorrt", "") in ("", onnx.tensorrt)
    return is_same and device.kind == "cuda" and key.options.get("l4t", "") in ("", device.l4t)


def is_like(key: EngineKey, choice: BuildChoice, machine: Machine) -> bool:
    """Whether an engine is, by what can be told without its sources, the one that is wanted."""
    is_so = key.runtime == choice.target and proven_provider(key) == choice.provider
    return is_so and machine.version(key.runtime) in ("", key.runtime_version) and opens_here(key, machine)


def _likeness(engine: StoredEngine, choice: BuildChoice, machine: Machine) -> tuple[bool, bool, bool, bool, str]:
    key = engine.record.key
    return (
        key.runtime == choice.target and proven_provider(key) == choice.provider,
        is_like(key, choice, machine),
        key.precision == choice.precision,
        key.runtime != "onnxruntime",
        engine.record.created_at,
    )
