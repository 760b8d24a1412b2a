"""What is said of a node in a list, and how urgent it is."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from agent.protocol.messages import Heartbeat, Meta, ModelState, PipelineState, State
from agent.protocol.wire import wire_now
from coordinator.decide import Lease, NodeView
from coordinator.registry import NodeRow
from coordinator.summary import Known, summary, troubles

TINY = ModelState(name="tiny", status="serving", task="generation")
VIEW = NodeView("edge-a", is_online=True, is_ready=True, mode="standby")
FINE = Known(NodeRow("edge-a"), VIEW, "online", 1.0, None)


def state(**fields: Any) -> State:
    return State(node="edge-a", boot="b", seq=1, mode="standby", epoch=1, **fields)


def with_row(**fields: Any) -> Known:
    return replace(FINE, row=replace(FINE.row, **fields))


def failed(name: str, message: str) -> ModelState:
    return ModelState(name=name, status="failed", message=message)


def heartbeat(**fields: Any) -> Heartbeat:
    return Heartbeat(node="edge-a", boot="b", sess=1, seq=1, ts=wire_now(), mono=1.0, mode="standby", epoch=1, **fields)


def certificate(days: float) -> Meta:
    return Meta(node="edge-a", boot="b", agent="0.1", cert_exp=wire_now() + timedelta(days=days))


@pytest.mark.parametrize(
    ("known", "urgency", "says"),
    [
        (replace(FINE, view=replace(VIEW, is_online=False), presence="will"), 3, "connection broke"),
        (replace(FINE, view=replace(VIEW, is_online=False), presence="silent"), 3, "three heartbeats"),
        (replace(FINE, view=replace(VIEW, is_online=False), presence="reboot"), 2, "reboots"),
        (replace(FINE, view=replace(VIEW, is_online=False), presence="a word of tomorrow"), 3, "a word of tomorrow"),
        (replace(FINE, view=replace(VIEW, mode="degraded")), 3, "worker"),
        (replace(FINE, view=replace(VIEW, mode="autonomous")), 2, "without a lease"),
        (replace(FINE, problem="order not sent: x"), 3, "order not sent"),
        (with_row(state=state(models=(failed("tiny", "boxes are lost"),))), 3, "model tiny failed: boxes are lost"),
        (with_row(state=state(pipelines=(PipelineState(id="gate", status="failed"),))), 3, "camera gate failed"),
        (with_row(heartbeat=heartbeat(throttled=True)), 2, "throttled"),
        (with_row(meta=certificate(-1)), 3, "ended"),
        (with_row(meta=certificate(3)), 2, "ends"),
        (replace(with_row(state=state(desired_rev=3, applied_rev=3)), wanted=4), 2, "not taken"),
        (replace(with_row(state=state(desired_rev=4, applied_rev=3)), wanted=4), 2, "does not run yet"),
        (with_row(is_drained=True), 1, "drained"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_trouble_is_said_and_weighed(known: Known, urgency: int, says: str) -> None:
    told = summary(known, primary_is_down=False, now_s=0.0, now=wire_now())
    assert told["urgency"] == urgency
    assert any(says in words for words in told["troubles"])


def test_no_trouble_where_there_is_none() -> None:
    calm = replace(with_row(state=state(models=(TINY,), desired_rev=4, applied_rev=4), meta=certificate(90)), wanted=4)
    assert list(troubles(calm, True, wire_now())) == []


def test_a_node_that_cannot_help_is_told_while_help_is_needed() -> None:
    idle = replace(FINE, view=replace(VIEW, is_ready=False))
    assert [list(troubles(idle, is_down, wire_now())) for is_down in (True, False)] == [[(2, "cannot help: no chat model serves")], []]


def test_the_worst_comes_first_and_figures_are_those_of_the_heartbeat() -> None:
    many = tuple(failed(f"m{n}", "x" * 2000) for n in range(100))
    row = replace(
        FINE.row, is_drained=True, state=state(models=(TINY, *many)), heartbeat=heartbeat(temp_c={"cpu": 61.0, "gpu": 48.0}, cpu=12.5)
    )
    known = replace(FINE, row=row, view=replace(VIEW, lease=Lease("full", 70.0, 0.0)))
    told = summary(known, primary_is_down=False, now_s=10.0, now=wire_now())
    assert told["troubles"][0].startswith("model m0 failed") and len(told["troubles"]) == 3
    assert all(len(words) < 200 for words in told["troubles"])
    assert [model["status"] for model in told["model_states"]] == ["failed"] * 6 and told["model_count"] == 101
    assert (told["hottest_c"], told["cpu"], told["lease"], told["lease_left_s"]) == (61.0, 12.5, "full", 60.0)
