"""What a worker is at the moment: a tagged union, times monotonic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agent.supervision.exit_cause import ExitCause


@dataclass(frozen=True, slots=True)
class Stopped:
    """Not started yet, or ended because we wanted it."""


@dataclass(frozen=True, slots=True)
class Starting:
    since_s: float
    incarnation: int


@dataclass(frozen=True, slots=True)
class Running:
    """`incarnation` counts the processes of this worker: what was opened in an older one is gone."""

    pid: int
    since_s: float
    incarnation: int
    python: str
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BackingOff:
    until_s: float
    cause: ExitCause


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Too many crashes; rests until `until_s` or until `Worker.release`."""

    until_s: float
    cause: ExitCause


WorkerState = Stopped | Starting | Running | BackingOff | Quarantined
