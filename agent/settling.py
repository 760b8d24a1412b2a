"""Waiting until what was ordered is so, or cannot be. The callers set the deadlines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.plan import wanted_models
from agent.reconcile import Reconciler
from agent.state import Absent, Broken, NotRenewed, Refused, Running, Serving


async def model_settled(reconciler: Reconciler, model: str, must_be_current: bool) -> Serving | Broken | NotRenewed | Absent:
    """Serving once it serves, with `must_be_current` by the engine that is wanted now; Broken or NotRenewed if it failed anew; Absent
    if it is no longer wanted."""
    first, first_renewal = reconciler.models.get(model), reconciler.actual.renewals.get(model)
    while True:
        actual = reconciler.actual
        state, renewal = actual.models.get(model), actual.renewals.get(model)
        if model not in wanted_models(reconciler.desired.value):
            return Absent()
        if isinstance(state, Broken) and state is not first:
            return state
        if isinstance(renewal, NotRenewed) and renewal is not first_renewal and must_be_current:
            return renewal
        if isinstance(state, Serving) and (state.is_current or not must_be_current):
            return state
        await reconciler.next_change()


async def model_gone(reconciler: Reconciler, model: str) -> None:
    """Until nothing is left of a model, or it is wanted again."""
    while model in reconciler.models and model not in wanted_models(reconciler.desired.value):
        await reconciler.next_change()


async def pipeline_settled(reconciler: Reconciler, pipeline: str, settings: Mapping[str, Any]) -> Running | Refused:
    """Until the pipeline runs with these settings; Refused if it, or its model, failed anew, or others are wanted now."""
    model = str(settings.get("model"))
    first, first_model = reconciler.actual.pipelines.get(pipeline), reconciler.models.get(model)
    while True:
        actual = reconciler.actual
        state, model_state = actual.pipelines.get(pipeline), actual.models.get(model)
        if reconciler.desired.value.pipelines.get(pipeline) != settings:
            return Refused(settings, "a newer order took its place", 0, 0.0)
        if isinstance(state, Running) and state.settings == settings and reconciler.pipelines.runs(state):
            return state
        if isinstance(state, Refused) and state.settings == settings and state is not first:
            return state
        if isinstance(model_state, Broken) and model_state is not first_model:
            return Refused(settings, f"its model {model} does not serve: {model_state.message}", 0, 0.0)
        await reconciler.next_change()
