"""What reconciliation asks of the making of engines, and what it gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from agent.errors import AgentError
from models.manifest import Manifest


class Progress(Protocol):
    """Told the phase, the share of the whole that is done, and in words what goes on (TensorRT's own phase, seconds, memory)."""

    def __call__(self, phase: str, fraction: float, message: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class Wish:
    """`build`: what an order says of how to build it. `distrusted`: engine folders that a worker could not open. `serving`: the folder of
    the engine that serves while another one is made."""

    manifest: Manifest
    build: Mapping[str, Any] = field(default_factory=dict)
    distrusted: frozenset[Path] = frozenset()
    serving: Path | None = None


@dataclass(frozen=True, slots=True)
class Built:
    """A model ready to be opened: its engine folder, what is recorded of it, and whether it is known to be the engine wanted now."""

    folder: Path
    record: Mapping[str, Any]
    is_current: bool = True


class PreparationFailed(Exception):
    """A model could not be fetched, converted or verified; the message is for people.

    `code` is that of the converter's error, or empty; `verdict` what was measured, if anything was. `is_final`: the same will happen again
    unless somebody changes something.
    """

    def __init__(self, message: str, code: str = "", verdict: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.verdict = verdict or {}

    @property
    def is_final(self) -> bool:
        return self.code in FINAL_CODES


class NotVerified(AgentError):
    """An engine that is not proven to be the model it was made from is not served by default."""

    code = "not_verified"

    def __init__(self, model: str, folder: Path, record: Mapping[str, Any]) -> None:
        reason = str(record.get("verdict", {}).get("reason") or "its verification did not run")
        super().__init__(
            f"the engine {folder.name} is not proven to be {model}: {reason}; build it again, "
            "or let convert.accept_unverified of the configuration, or accept_unverified of the order, say that it may serve"
        )


def is_verified(record: Mapping[str, Any]) -> bool:
    """Whether the verdict beside an engine says that it passed."""
    verdict = record.get("verdict")
    return isinstance(verdict, Mapping) and verdict.get("passed") is True


FINAL_CODES = frozenset(
    {"bad_request", "bad_file", "unsupported", "unsupported_operator", "parse", "no_profile", "not_the_same_model", "not_verified"}
)


class Preparation(Protocol):
    """`progress` is told phases and shares of the whole. Both raise PreparationFailed."""

    async def prepare(self, wish: Wish, progress: Progress) -> Built:
        """Whatever verified engine can serve soonest."""

    async def renew(self, wish: Wish, progress: Progress) -> Built:
        """The engine that is wanted now, built unless it is there."""
