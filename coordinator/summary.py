"""One node in a few words and numbers, as lists of the whole fleet show it: of a bounded size, its troubles in words. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from agent.protocol.messages import ModelState, PipelineState
from coordinator.decide import NodeView
from coordinator.registry import NodeRow

MODELS_SHOWN = 6
TROUBLES_SHOWN = 3
WORDS = 160  # characters of what a node says of one trouble
CERTIFICATE_DAYS = 14

Urgency = Literal[0, 1, 2, 3]  # nothing to say, worth knowing, heals by itself or was ordered, somebody must look
AWAY: dict[str, tuple[Urgency, str]] = {
    "will": (3, "its connection broke"),
    "silent": (3, "fell silent: three heartbeats did not come"),
    "unknown": (3, "never said that it is there"),
    "shutdown": (2, "was shut down"),
    "update": (2, "is away for an update"),
    "reboot": (2, "reboots"),
}


@dataclass(frozen=True, slots=True)
class Known:
    """All that the coordinator knows of a node. `silence_s` None: not heard by this process; `wanted` None: it has its own document.

    `problem`: what keeps the coordinator from ordering it about.
    """

    row: NodeRow
    view: NodeView
    presence: str
    silence_s: float | None
    wanted: int | None
    problem: str = ""


def summary(known: Known, primary_is_down: bool, now_s: float, now: datetime) -> dict[str, Any]:
    """`urgency` orders a list, the `troubles` say why, the worst first. `now` is compared with the end of certificates only."""
    row, view, state, beat = known.row, known.view, known.row.state, known.row.heartbeat
    meta = row.meta
    models = sorted(state.models, key=lambda model: model.status in ("serving", "ready")) if state else []
    found = sorted(troubles(known, primary_is_down, now), key=lambda trouble: -trouble[0])
    said = max((part.ts for part in (row.presence, beat) if part), default=None)
    return {
        "node": row.node,
        "is_online": view.is_online,
        "is_ready": view.is_ready,
        "is_drained": row.is_drained,
        "presence": known.presence,
        "urgency": found[0][0] if found else 0,
        "troubles": [words for _, words in found[:TROUBLES_SHOWN]],
        "mode": view.mode,
        "epoch": row.epoch,
        "lease": view.lease.kind if view.lease else None,
        "lease_left_s": round(max(0.0, view.lease.until_s - now_s), 1) if view.lease else None,
        "silence_s": None if known.silence_s is None else round(known.silence_s, 1),
        "said_at": said.isoformat() if said else None,
        "agent": meta.agent if meta else None,
        "module": meta.hw.module if meta else None,
        "models": [model.name for model in models if model.status == "serving"],
        "model_states": [{"name": model.name, "status": model.status} for model in models[:MODELS_SHOWN]],
        "model_count": len(models),
        "pipelines": _counts(state.pipelines if state else ()),
        "cpu": beat.cpu if beat else None,
        "gpu": beat.gpu if beat else None,
        "hottest_c": max(beat.temp_c.values(), default=None) if beat else None,
        "mem_mb": beat.mem_mb if beat else None,
        "mem_total_mb": meta.hw.mem_mb if meta else None,
        "desired": None
        if known.wanted is None
        else {"wanted": known.wanted, "taken": state.desired_rev if state else 0, "applied": state.applied_rev if state else 0},
    }


def troubles(known: Known, primary_is_down: bool, now: datetime) -> Iterator[tuple[Urgency, str]]:
    """What somebody might want to look after, and how soon. Of a node that is away, only that counts."""
    row, view = known.row, known.view
    if row.is_drained:
        yield 1, "drained by an operator"
    if not view.is_online:
        yield AWAY.get(known.presence, (3, known.presence))
        return
    if known.problem:
        yield 3, known.problem[:WORDS]
    if view.mode == "degraded":
        yield 3, "a worker or every model is down"
    if view.mode == "autonomous":
        yield 2, "serves without a lease: it heard no coordinator"
    if primary_is_down and not view.is_ready and not row.is_drained:
        yield 2, "cannot help: no chat model serves"
    if row.heartbeat and row.heartbeat.throttled:
        yield 2, "throttled by heat or power"
    yield from _of_parts(known)
    yield from _of_certificate(row, now)


def _of_parts(known: Known) -> Iterator[tuple[Urgency, str]]:
    state = known.row.state
    for model in state.models if state else ():
        if model.status == "failed":
            yield 3, _said("model", model.name, model)
    for pipeline in state.pipelines if state else ():
        if pipeline.status == "failed":
            yield 3, _said("camera", pipeline.id, pipeline)
    if known.wanted is not None and (state is None or state.desired_rev < known.wanted):
        yield 2, f"revision {known.wanted} of its document is not taken"
    elif known.wanted is not None and state is not None and state.applied_rev < known.wanted:
        yield 2, f"revision {known.wanted} of its document does not run yet"


def _of_certificate(row: NodeRow, now: datetime) -> Iterator[tuple[Urgency, str]]:
    ends = row.meta.cert_exp if row.meta else None
    if ends is not None and (ends - now).days < CERTIFICATE_DAYS:
        yield (3 if ends <= now else 2), f"its certificate {'ended' if ends <= now else 'ends'} on {ends.date()}"


def _said(kind: str, name: str, part: ModelState | PipelineState) -> str:
    return f"{kind} {name} failed" + (f": {part.message[:WORDS]}" if part.message else "")


def _counts(pipelines: tuple[PipelineState, ...]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for pipeline in pipelines:
        counts[pipeline.status] = counts.get(pipeline.status, 0) + 1
    return counts
