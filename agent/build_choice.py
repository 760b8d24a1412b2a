"""Which engine is wanted on this machine, and which of those in the store can serve. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent.config import ConvertSettings
from agent.preparation import PreparationFailed, is_verified
from models.device import Device
from models.engine_record import EngineKey, StoredEngine
from models.manifest import GenerationManifest, Manifest, Precision, manifest_digest
from models.runtimes import Runtimes

BuildTarget = Literal["onnxruntime", "native", "tensorrt", "tensorrt_rtx"]

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

    @property
    def is_slow(self) -> bool:
        """Plans take minutes to an hour; the others seconds to a minute."""
        return self.target.startswith("tensorrt")


def choices(
    settings: ConvertSettings, order: Mapping[str, Any], machine: Machine, manifest: Manifest, calibration: Path | None = None
) -> tuple[BuildChoice, ...]:
    """What is wanted, then what is taken where the first is not to be had. The order wins over the configuration; `calibration` is a path
    that somebody on this machine has named, where an order can only name an entry of the node's folder.

    Raises PreparationFailed for a target or a calibration that this machine does not have.
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
    return tuple(BuildChoice(each, precision, calibration, accepts) for each in targets)


def quick_choice(settings: ConvertSettings, order: Mapping[str, Any]) -> BuildChoice:
    """What is built in seconds and opens everywhere."""
    return BuildChoice(accept_unverified=bool(settings.accept_unverified or order.get("accept_unverified")))


def _automatic(machine: Machine, manifest: Manifest) -> tuple[BuildTarget, ...]:
    if machine.version("tensorrt") and machine.runtimes.device.kind == "cuda":
        return ("tensorrt",)
    if isinstance(manifest, GenerationManifest) and machine.has_compiler:
        return "native", "onnxruntime"
    return ("onnxruntime",)


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
    """A plan runs on the TensorRT, the GPU and the L4T it was built with, native code on its CPU, a graph on any ONNX Runtime."""
    if key.runtime == "onnxruntime":
        return True
    if key.runtime == "native":
        return key.device == machine.cpu
    device = machine.runtimes.device
    is_same = machine.version(key.runtime) == key.runtime_version and key.device == device.key
    return is_same and device.kind == "cuda" and key.options.get("l4t", "") in ("", device.l4t)


def is_like(key: EngineKey, choice: BuildChoice, machine: Machine) -> bool:
    """Whether an engine is, by what can be told without its sources, the one that is wanted."""
    return key.runtime == choice.target and machine.version(key.runtime) in ("", key.runtime_version) and opens_here(key, machine)


def _likeness(engine: StoredEngine, choice: BuildChoice, machine: Machine) -> tuple[bool, bool, bool, bool, str]:
    key = engine.record.key
    return (
        key.runtime == choice.target,
        is_like(key, choice, machine),
        key.precision == choice.precision,
        key.runtime != "onnxruntime",
        engine.record.created_at,
    )
