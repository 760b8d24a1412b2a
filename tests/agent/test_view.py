"""What the coordinator is told of a camera, from what its worker reports."""

from __future__ import annotations

import pytest

from agent.protocol.messages import PipelineState
from agent.view import _pipeline_state


@pytest.mark.parametrize(
    ("reported", "told"),
    [
        ({"state": "streaming", "fps": 2.04, "is_slowed": True}, PipelineState(id="belt", status="running", fps=2.0, is_slowed=True)),
        ({"state": "streaming", "fps": float("nan")}, PipelineState(id="belt", status="running")),
        ({"state": "paused", "message": ""}, PipelineState(id="belt", status="paused")),
        ({"state": "backing_off", "message": "refused"}, PipelineState(id="belt", status="starting", message="refused")),
        ({}, PipelineState(id="belt", status="starting")),
    ],
)
def test_a_pipeline_is_told_in_the_words_of_the_wire(reported: dict[str, object], told: PipelineState) -> None:
    assert _pipeline_state("belt", reported) == told
    assert PipelineState.model_validate_json(told.model_dump_json(exclude={"is_slowed"})).is_slowed is False  # of a node of before
