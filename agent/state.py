"""What should be on this node and what is: frozen values that `plan` compares and `reconcile` acts on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Settings = Mapping[str, Any]
WorkerName = Literal["text", "vision"]
SleepReason = Literal["idle", "memory"]

WORKER_OF_TASK: dict[str, WorkerName] = {
    "generation": "text",
    "embedding": "text",
    "classification": "text",
    "detection": "vision",
}


@dataclass(frozen=True, slots=True)
class Desired:
    """Models to serve, in order of importance, and camera pipelines by id. `revision` is that of the coordinator's document.

    `builds`: model → how an order wants its engine built, as in ModelDeployArgs; without an entry the configuration says it.
    """

    models: tuple[str, ...] = ()
    pipelines: Mapping[str, Settings] = field(default_factory=dict)
    revision: int = 0
    builds: Mapping[str, Settings] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Absent:
    """Nothing is known to be on the disk: it has to be prepared."""


@dataclass(frozen=True, slots=True)
class Preparing:
    """Being fetched, converted and verified. `message`: what goes on within the phase, for people."""

    phase: str = "queued"
    fraction: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Converted and verified in `folder`; not loaded. `is_current`: known to be the engine that is wanted now, else one has to look."""

    folder: Path
    record: Mapping[str, Any]
    is_current: bool = True


@dataclass(frozen=True, slots=True)
class Serving:
    """Loaded by the given incarnation of its worker."""

    folder: Path
    record: Mapping[str, Any]
    incarnation: int
    details: Mapping[str, Any] = field(default_factory=dict)
    is_current: bool = True


@dataclass(frozen=True, slots=True)
class Asleep:
    """Taken out of memory because nobody asked for it (`idle`) or memory was short (`memory`); loaded again once somebody asks."""

    folder: Path
    record: Mapping[str, Any]
    reason: SleepReason
    is_current: bool = True
    is_roused: bool = False


@dataclass(frozen=True, slots=True)
class Broken:
    """Could not be prepared or loaded; tried again at `retry_at_s` (monotonic; infinite: when somebody asks for it)."""

    message: str
    attempts: int
    retry_at_s: float


ModelState = Absent | Preparing | Prepared | Serving | Asleep | Broken


@dataclass(frozen=True, slots=True)
class Renewing:
    """The engine that is wanted now is looked for or built, while another one serves. `message` as in Preparing."""

    phase: str = "queued"
    fraction: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Renewed:
    """It is there, and takes the place of the one that serves as soon as the worker has opened it."""

    folder: Path
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NotRenewed:
    """It could not be made or opened; the one before goes on serving."""

    message: str
    attempts: int
    retry_at_s: float


Renewal = Renewing | Renewed | NotRenewed


@dataclass(frozen=True, slots=True)
class Running:
    """A pipeline started with `settings` in the given incarnation of the vision worker."""

    settings: Settings
    incarnation: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A pipeline that the worker would not start, e.g. for its settings; tried again at `retry_at_s` or with other settings."""

    settings: Settings
    message: str
    attempts: int
    retry_at_s: float


PipelineState = Running | Refused


@dataclass(frozen=True, slots=True)
class Use:
    """What is asked of a model: requests that it answers now, and when (monotonic) it was last loaded or asked."""

    last_s: float
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Actual:
    """`workers` gives the incarnation of each worker that is running now; one that is not has no entry. `free_bytes` of memory; None: not
    known, or nobody cares."""

    models: Mapping[str, ModelState] = field(default_factory=dict)
    pipelines: Mapping[str, PipelineState] = field(default_factory=dict)
    workers: Mapping[WorkerName, int] = field(default_factory=dict)
    worker_of: Mapping[str, WorkerName] = field(default_factory=dict)
    renewals: Mapping[str, Renewal] = field(default_factory=dict)
    uses: Mapping[str, Use] = field(default_factory=dict)
    free_bytes: int | None = None
