"""The node's brain on plain values."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.plan import QUIET_S, Close, Open, Prepare, Renew, RestPolicy, Sleep, Start, Step, Stop, Swap, plan, wanted_models
from agent.state import (
    Absent,
    Actual,
    Asleep,
    Broken,
    Desired,
    ModelState,
    NotRenewed,
    Prepared,
    Preparing,
    Refused,
    Renewal,
    Renewed,
    Renewing,
    Running,
    Serving,
    Use,
)

FOLDER = Path("/engines/x")
READY = Prepared(FOLDER, {})
BELT = {"model": "eyes", "source": "conveyor:"}


def serving(incarnation: int = 1) -> Serving:
    return Serving(FOLDER, {}, incarnation)


def test_models_are_prepared_one_at_a_time_in_order_of_importance() -> None:
    desired = Desired(("chat", "embed"))
    assert plan(desired, Actual(), 0.0) == [Prepare("chat")]
    assert plan(desired, Actual({"chat": Preparing()}), 0.0) == []


def test_a_prepared_model_is_opened_once_its_worker_runs() -> None:
    desired = Desired(("chat",))
    waiting = Actual({"chat": READY}, worker_of={"chat": "text"})
    assert plan(desired, waiting, 0.0) == []
    assert plan(desired, Actual({"chat": READY}, {}, {"text": 1}, {"chat": "text"}), 0.0) == [Open("chat")]


def test_a_new_incarnation_of_the_worker_gets_its_models_and_pipelines_again() -> None:
    desired = Desired((), {"belt": BELT})
    old = Actual({"eyes": serving(1)}, {"belt": Running(BELT, 1)}, {"vision": 2}, {"eyes": "vision"})
    assert plan(desired, old, 0.0) == [Open("eyes")], "the camera has to wait for its model"
    reopened = Actual({"eyes": serving(2)}, {"belt": Running(BELT, 1)}, {"vision": 2}, {"eyes": "vision"})
    assert plan(desired, reopened, 0.0) == [Start("belt")]


def test_a_broken_model_waits_for_its_time_and_does_not_hold_up_the_others() -> None:
    actual = Actual({"chat": Broken("no space", 1, 50.0)})
    assert plan(Desired(("chat", "embed")), actual, 49.0) == [Prepare("embed")]
    assert plan(Desired(("chat",)), actual, 50.0) == [Prepare("chat")]


def test_what_is_not_wanted_goes_but_a_build_is_not_interrupted() -> None:
    actual = Actual({"chat": serving(), "old": Preparing()}, {"belt": Running(BELT, 1)}, {"text": 1, "vision": 1}, {"chat": "text"})
    assert plan(Desired(), actual, 0.0) == [Stop("belt"), Close("chat")]


def test_changed_settings_restart_a_pipeline_and_a_refusal_is_not_repeated_early() -> None:
    models: dict[str, ModelState] = {"eyes": serving()}
    changed = {**BELT, "fps": 5}
    running = Actual(models, {"belt": Running(BELT, 1)}, {"vision": 1}, {"eyes": "vision"})
    assert plan(Desired((), {"belt": BELT}), running, 0.0) == []
    assert plan(Desired((), {"belt": changed}), running, 0.0) == [Start("belt")]
    refused = Actual(models, {"belt": Refused(BELT, "no such camera", 1, 50.0)}, {"vision": 1}, {"eyes": "vision"})
    assert plan(Desired((), {"belt": BELT}), refused, 49.0) == []
    assert plan(Desired((), {"belt": changed}), refused, 49.0) == [Start("belt")]


EARLIER = Serving(FOLDER, {}, 1, {}, is_current=False)
ALIVE: dict[str, Any] = {"workers": {"text": 1, "vision": 1}, "worker_of": {"chat": "text", "embed": "text"}}


def renewing(renewal: Renewal | None, state: ModelState = EARLIER) -> Actual:
    return Actual({"chat": state}, renewals={} if renewal is None else {"chat": renewal}, **ALIVE)


def test_what_serves_is_renewed_once_nothing_else_waits_for_the_builder() -> None:
    assert plan(Desired(("chat",)), renewing(None), 0.0) == [Renew("chat")]
    assert plan(Desired(("chat", "embed")), renewing(None), 0.0) == [Prepare("embed")], "what serves nothing yet goes first"
    busy = Actual({"chat": EARLIER, "embed": Preparing()}, **ALIVE)
    assert plan(Desired(("chat", "embed")), busy, 0.0) == []
    assert plan(Desired(("chat",)), renewing(None, Prepared(FOLDER, {}, is_current=False)), 0.0) == [Open("chat")], "first it serves"
    assert plan(Desired(("chat",)), renewing(None, serving(1)), 0.0) == []


def test_a_renewal_goes_through_its_steps_beside_what_serves() -> None:
    desired = Desired(("chat",))
    assert plan(desired, renewing(Renewing("convert", 0.5)), 0.0) == []
    assert plan(desired, renewing(Renewed(Path("/engines/new"), {})), 0.0) == [Swap("chat")]
    assert plan(Desired(("chat", "embed")), renewing(Renewing()), 0.0) == [], "one build at a time"


def test_a_renewal_that_failed_waits_for_its_time() -> None:
    failed = renewing(NotRenewed("boxes are lost", 1, 50.0))
    assert plan(Desired(("chat",)), failed, 49.0) == []
    assert plan(Desired(("chat",)), failed, 50.0) == [Renew("chat")]
    for_ever = renewing(NotRenewed("no such operator", 1, math.inf))
    assert plan(Desired(("chat",)), for_ever, 1e12) == []


def test_a_new_worker_gets_the_new_engine_at_once() -> None:
    old = replace(EARLIER, incarnation=0)
    assert plan(Desired(("chat",)), renewing(Renewed(Path("/engines/new"), {}), old), 0.0) == [Swap("chat")]
    assert plan(Desired(("chat",)), renewing(NotRenewed("no", 1, 50.0), old), 0.0) == [Open("chat")]


def test_what_is_not_wanted_is_not_renewed() -> None:
    assert plan(Desired(), renewing(Renewing()), 0.0) == [Close("chat")]


TEXT: dict[str, Any] = {"workers": {"text": 1}, "worker_of": {"chat": "text", "code": "text"}}
BOTH = Desired(("chat", "code"))
HOUR = RestPolicy(idle_s=3600.0)
ROOMY = RestPolicy(keep_free_bytes=100)


def used(chat: Use, code: Use, free_bytes: int | None = None, **changes: Any) -> Actual:
    return Actual({"chat": serving(), "code": serving()}, uses={"chat": chat, "code": code}, free_bytes=free_bytes, **{**TEXT, **changes})


@pytest.mark.parametrize(
    ("rest", "chat", "code", "free_bytes", "steps"),
    [
        (RestPolicy(), Use(0.0), Use(0.0), None, []),
        (HOUR, Use(0.0), Use(9_000.0), None, [Sleep("chat", "idle")]),
        (HOUR, Use(0.0, in_flight=1), Use(9_000.0), None, []),
        (HOUR, Use(6_400.0), Use(6_401.0), None, [Sleep("chat", "idle")]),
        (HOUR, Use(0.0), Use(0.0), None, [Sleep("chat", "idle"), Sleep("code", "idle")]),
        (ROOMY, Use(9_000.0), Use(8_000.0), 100, []),
        (ROOMY, Use(9_000.0), Use(8_000.0), 99, [Sleep("code", "memory")]),
        (ROOMY, Use(9_000.0), Use(8_000.0, in_flight=1), 99, [Sleep("chat", "memory")]),
        (ROOMY, Use(10_001.0 - QUIET_S), Use(10_002.0 - QUIET_S), 0, []),
        (ROOMY, Use(9_000.0), Use(8_000.0), None, []),
        (RestPolicy(3600.0, 100), Use(0.0), Use(9_000.0), 0, [Sleep("chat", "idle")]),
    ],
    ids=[
        "warm for good", "idle for an hour", "at work for an hour", "to the second", "both idle", "enough memory",
        "short of memory: the one that rested longest", "never one at work", "never one just asked", "memory unknown",
        "who goes anyway makes room",
    ],
)  # fmt: skip
def test_who_rests_leaves_memory(rest: RestPolicy, chat: Use, code: Use, free_bytes: int | None, steps: list[Step]) -> None:
    assert plan(BOTH, used(chat, code, free_bytes), 10_000.0, rest) == steps


def test_only_text_models_that_are_settled_sleep() -> None:
    old = Use(0.0)
    seeing: dict[str, Any] = {"workers": {"text": 1, "vision": 1}, "worker_of": {"chat": "text", "code": "vision"}}
    assert plan(BOTH, used(old, old, **seeing), 1e4, HOUR) == [Sleep("chat", "idle")]
    assert plan(BOTH, used(old, old, renewals={"chat": Renewing()}), 1e4, HOUR) == [Sleep("code", "idle")]
    assert plan(BOTH, used(old, old, renewals={"chat": NotRenewed("no", 1, math.inf)}), 1e4, HOUR)[0] == Sleep("chat", "idle")


def test_who_sleeps_is_left_alone_until_somebody_asks() -> None:
    asleep = Asleep(FOLDER, {}, "idle", is_current=False)
    assert plan(Desired(("chat",)), Actual({"chat": asleep}, **TEXT), 0.0) == [], "not even a newer engine is built"
    assert plan(Desired(("chat",)), Actual({"chat": replace(asleep, is_roused=True)}, **TEXT), 0.0) == [Open("chat")]
    assert plan(Desired(), Actual({"chat": asleep}, **TEXT), 0.0) == [Close("chat")]


NAMES = st.sampled_from(["a", "b", "c"])
STATES = st.sampled_from([Absent(), Preparing(), READY, serving(1), serving(2), EARLIER, Broken("x", 1, 10.0)])


def carry_out(step: Step, actual: Actual, desired: Desired) -> Actual:
    models, pipelines, renewals = dict(actual.models), dict(actual.pipelines), dict(actual.renewals)
    match step:
        case Renew(model=model):
            renewals[model] = Renewed(FOLDER, {})
        case Swap(model=model):
            del renewals[model]
            models[model] = serving(1)
        case Prepare(model=model):
            models[model] = READY
        case Open(model=model):
            models[model] = serving(1)
        case Close(model=model):
            models.pop(model)
        case Start(pipeline=pipeline):
            pipelines[pipeline] = Running(desired.pipelines[pipeline], 1)
        case Stop(pipeline=pipeline):
            pipelines.pop(pipeline)
    worker_of = {**actual.worker_of, **dict.fromkeys(models, "vision")}
    return Actual(models, pipelines, actual.workers, worker_of, renewals)  # type: ignore[arg-type]  # the literal is a worker's name


@given(st.lists(NAMES, unique=True), st.dictionaries(NAMES, STATES), st.dictionaries(NAMES, st.just(BELT)))
def test_any_start_converges_to_what_is_desired(
    models: list[str], states: dict[str, ModelState], pipelines: dict[str, dict[str, str]]
) -> None:
    desired = Desired(tuple(models), pipelines)
    settled: dict[str, ModelState] = {name: READY if isinstance(state, Preparing) else state for name, state in states.items()}
    actual = Actual(settled, {}, {"vision": 1}, dict.fromkeys(settled, "vision"))
    for _ in range(20):
        steps = plan(desired, actual, 100.0)
        if not steps:
            break
        for step in steps:
            actual = carry_out(step, actual, desired)
    assert set(actual.models) == set(wanted_models(desired))
    assert all(state == serving(1) for state in actual.models.values())
    assert set(actual.pipelines) == set(pipelines)
