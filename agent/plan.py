"""plan(desired, actual, now) → steps: the node's brain, pure. `reconcile` alone carries the steps out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from agent.state import (
    Absent,
    Actual,
    Asleep,
    Broken,
    Desired,
    NotRenewed,
    PipelineState,
    Prepared,
    Preparing,
    Refused,
    Renewed,
    Renewing,
    Running,
    Serving,
    SleepReason,
)

QUIET_S = 30.0  # short memory does not take a model out under somebody who is between two turns


@dataclass(frozen=True, slots=True)
class Prepare:
    """Find an engine that can serve at once, or else fetch, convert, verify."""

    model: str


@dataclass(frozen=True, slots=True)
class Renew:
    """Make the engine that is wanted now, beside the one that serves."""

    model: str


@dataclass(frozen=True, slots=True)
class Open:
    model: str


@dataclass(frozen=True, slots=True)
class Swap:
    """Open the renewed engine in the place of the one that serves."""

    model: str


@dataclass(frozen=True, slots=True)
class Close:
    model: str


@dataclass(frozen=True, slots=True)
class Sleep:
    """Take a model out of memory that is still wanted."""

    model: str
    reason: SleepReason


@dataclass(frozen=True, slots=True)
class Start:
    pipeline: str


@dataclass(frozen=True, slots=True)
class Stop:
    pipeline: str


Step = Prepare | Renew | Open | Swap | Close | Sleep | Start | Stop


@dataclass(frozen=True, slots=True)
class RestPolicy:
    """How long a text model that nobody asks stays in memory (0: for good), and how much memory is kept free at its cost (0: none)."""

    idle_s: float = 0.0
    keep_free_bytes: int = 0


def wanted_models(desired: Desired) -> tuple[str, ...]:
    """The models asked for and those that pipelines need, each once, in that order."""
    needed = (str(settings.get("model", "")) for settings in desired.pipelines.values())
    return tuple(dict.fromkeys([*desired.models, *(model for model in needed if model)]))


def plan(desired: Desired, actual: Actual, now_s: float, rest: RestPolicy = RestPolicy()) -> list[Step]:
    """The steps that bring `actual` closer to `desired` at the monotonic time `now_s`; empty when nothing can or need be done."""
    return [
        *_stops(desired, actual),
        *_closes(desired, actual),
        *_sleeps(desired, actual, now_s, rest),
        *_opens(desired, actual),
        *_builds(desired, actual, now_s),
        *_starts(desired, actual, now_s),
    ]


def _stops(desired: Desired, actual: Actual) -> Iterator[Step]:
    for pipeline in actual.pipelines:
        if pipeline not in desired.pipelines:
            yield Stop(pipeline)


def _closes(desired: Desired, actual: Actual) -> Iterator[Step]:
    # A pipeline that is to change its model sees with the old one until the new one is there.
    seeing = {state.settings.get("model") for state in actual.pipelines.values() if _runs(state, actual)}
    kept = {*wanted_models(desired), *seeing}
    for model, state in actual.models.items():
        if model not in kept and not isinstance(state, Preparing):
            yield Close(model)


def _runs(state: PipelineState, actual: Actual) -> bool:
    return isinstance(state, Running) and state.incarnation == actual.workers.get("vision")


def _sleeps(desired: Desired, actual: Actual, now_s: float, rest: RestPolicy) -> Iterator[Step]:
    """Who rested too long; else, where memory is short, the one that rested longest. One at a time: then memory is looked at again."""
    resting = sorted((actual.uses[model].last_s, model) for model in wanted_models(desired) if _rests(model, actual))
    too_long = [model for last_s, model in resting if 0 < rest.idle_s <= now_s - last_s]
    yield from (Sleep(model, "idle") for model in too_long)
    is_short = actual.free_bytes is not None and actual.free_bytes < rest.keep_free_bytes
    if is_short and not too_long and resting and now_s - resting[0][0] >= QUIET_S:
        yield Sleep(resting[0][1], "memory")


def _rests(model: str, actual: Actual) -> bool:
    """Only text models do: cameras never rest. One that is about to get another engine stays, for that takes its place while it serves."""
    state, use = actual.models.get(model), actual.uses.get(model)
    if not isinstance(state, Serving) or use is None or use.in_flight or actual.worker_of.get(model) != "text":
        return False
    renewal = actual.renewals.get(model)
    is_settled = (state.is_current and renewal is None) or isinstance(renewal, NotRenewed)
    return is_settled and state.incarnation == actual.workers.get("text")


def _opens(desired: Desired, actual: Actual) -> Iterator[Step]:
    for model in wanted_models(desired):
        state = actual.models.get(model, Absent())
        incarnation = actual.workers.get(actual.worker_of[model]) if model in actual.worker_of else None
        if incarnation is None or not isinstance(state, Prepared | Serving | Asleep):
            continue
        if isinstance(state, Asleep):
            if state.is_roused:
                yield Open(model)
        elif isinstance(actual.renewals.get(model), Renewed):
            yield Swap(model)
        elif isinstance(state, Prepared) or state.incarnation != incarnation:
            yield Open(model)


def _builds(desired: Desired, actual: Actual, now_s: float) -> Iterator[Step]:
    """One at a time, for a build takes the memory and the cores of the device; what serves nothing yet goes first."""
    is_building = any(isinstance(state, Preparing) for state in actual.models.values())
    if is_building or any(isinstance(renewal, Renewing) for renewal in actual.renewals.values()):
        return
    wanted = wanted_models(desired)
    for model in wanted:
        state = actual.models.get(model, Absent())
        if isinstance(state, Absent) or (isinstance(state, Broken) and now_s >= state.retry_at_s):
            yield Prepare(model)
            return
    for model in wanted:
        if _must_renew(model, actual, now_s):
            yield Renew(model)
            return


def _must_renew(model: str, actual: Actual, now_s: float) -> bool:
    """Not before it serves, where its worker lives: the build would take the cores that opening it needs."""
    state = actual.models.get(model)
    if not isinstance(state, Serving) or state.is_current:
        return False
    match actual.renewals.get(model):
        case None:
            return True
        case NotRenewed(retry_at_s=retry_at_s):
            return now_s >= retry_at_s
        case _:
            return False


def _starts(desired: Desired, actual: Actual, now_s: float) -> Iterator[Step]:
    incarnation = actual.workers.get("vision")
    if incarnation is None:
        return
    for pipeline, settings in desired.pipelines.items():
        model = actual.models.get(str(settings.get("model", "")))
        if not (isinstance(model, Serving) and model.incarnation == incarnation):
            continue
        match actual.pipelines.get(pipeline):
            case Running(settings=running, incarnation=started) if running == settings and started == incarnation:
                continue
            case Refused(settings=refused, retry_at_s=retry_at_s) if refused == settings and now_s < retry_at_s:
                continue
            case _:
                yield Start(pipeline)
