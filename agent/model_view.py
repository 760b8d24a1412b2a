"""One model as people see it: how far it is, what serves it, and how that was proven. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from agent.http.collaborators import AttemptView, BuildView, ModelView
from agent.patience import CANCELLED
from agent.state import Asleep, Broken, ModelState, NotRenewed, Prepared, Preparing, Renewal, Renewed, Renewing, Serving
from models.manifest import Manifest

REPORTED = {"Preparing": "building", "Prepared": "ready", "Serving": "serving", "Asleep": "serving", "Broken": "failed"}


def model_view(
    name: str,
    state: ModelState,
    renewal: Renewal | None,
    manifest: Manifest | None,
    aliases: Sequence[str],
    unloads: Mapping[str, int],
    reloads: int,
) -> ModelView:
    record = state.record if isinstance(state, Prepared | Serving | Asleep) else {}
    key, verdict = record.get("key", {}), record.get("verdict", {})
    return ModelView(
        name=name,
        task=manifest.task if manifest else "",
        status=reported(state),
        aliases=tuple(aliases),
        engine=f"{key['runtime']} {key['runtime_version']} · {verdict.get('precision') or key['precision']}" if key else "",
        verdict=("passed" if verdict.get("passed") else "failed") if verdict else "",
        licence=manifest.licence if manifest else "",
        figures=_figures(verdict),
        is_current=state.is_current if isinstance(state, Prepared | Serving | Asleep) else True,
        build=build_view(state, renewal),
        ladder=ladder_of(verdict),
        asleep=state.reason if isinstance(state, Asleep) else "",
        unloads=unloads,
        reloads=reloads,
    )


def reported(state: ModelState) -> str:
    return REPORTED.get(type(state).__name__, "building")


def build_view(state: ModelState, renewal: Renewal | None) -> BuildView | None:
    match state, renewal:
        case (Preparing() as build, _) | (_, Renewing() as build):
            return BuildView("building", build.phase, round(build.fraction, 3), build.message)
        case (_, Renewed()):
            return BuildView("waiting", "waits for its worker")
        case (Broken(message=message, attempts=attempts), _) | (_, NotRenewed(message=message, attempts=attempts)):
            return BuildView("cancelled" if message == CANCELLED else "failed", message=message, attempts=attempts)
        case _:
            return None


def ladder_of(verdict: Mapping[str, Any]) -> tuple[AttemptView, ...]:
    """The attempts of a verdict, as converters/verdict.py writes them."""
    return tuple(
        AttemptView(
            str(attempt.get("precision")),
            str(attempt.get("status")),
            str(attempt.get("reason") or ""),
            _worst(attempt.get("worst")),
            _notes(attempt.get("notes")),
        )
        for attempt in verdict.get("attempts", ())
        if isinstance(attempt, Mapping)
    )


# What converters note of an attempt (part, whole, words), in the order in which it is told.
_SHARES = (
    ("int8_nodes", "int8_candidates", "products in int8"),
    ("halved", "nodes", "nodes in half precision"),
    ("dla_layers", "layers", "layers on the DLA"),
)


def _notes(notes: object) -> str:
    if not isinstance(notes, Mapping):
        return ""
    shares = [(notes.get(part), notes.get(whole), words) for part, whole, words in _SHARES]
    told = [
        f"{part} of {whole} {words} ({part / whole:.0%})"
        for part, whole, words in shares
        if isinstance(part, int) and isinstance(whole, int) and whole > 0
    ]
    if notes.get("fp32_layers"):
        told.append(f"{notes['fp32_layers']} layers kept in fp32")
    if notes.get("rounded"):
        told.append(f"weights of {', '.join(map(str, notes['rounded']))} as eight bits")
    return "; ".join(told)


def _worst(worst: object) -> str:
    if not isinstance(worst, Mapping):
        return ""
    error = worst.get("relative_error")
    is_number = isinstance(error, int | float) and math.isfinite(error)
    return f"{worst.get('name')} ({worst.get('operator')}), " + (f"relative error {error:.3g}" if is_number else "not a number")


def _figures(verdict: Mapping[str, Any]) -> dict[str, float | str]:
    found = verdict.get("figures", {})
    return {key: float(f"{value:.4g}") for key, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}
