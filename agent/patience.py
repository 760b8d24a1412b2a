"""How long what failed is left alone before it is tried again, on the event loop's clock."""

from __future__ import annotations

import math
import random

import anyio

from agent.preparation import PreparationFailed

CANCELLED = "the build was cancelled; deploy the model again to take it up"
RETRY_BASE_S, RETRY_CAP_S = 5.0, 600.0
RENEWAL_BASE_S, RENEWAL_CAP_S = 60.0, 6 * 3600.0  # something serves meanwhile, and a build may take all cores for half an hour


def retry_at_s(attempts: int, failure: PreparationFailed | None = None) -> float:
    """For what serves nothing. What will fail again in the same way waits long, what takes its worker's other models with it
    (code `lethal`) ten minutes, what was cancelled until somebody asks."""
    if failure is not None and failure.code == "cancelled":
        return math.inf
    if failure is not None and failure.is_final:
        return anyio.current_time() + RENEWAL_CAP_S
    is_lethal = failure is not None and failure.code == "lethal"
    return anyio.current_time() + (RETRY_CAP_S if is_lethal else _wait_s(attempts, RETRY_BASE_S, RETRY_CAP_S))


def renewal_at_s(attempts: int, failure: PreparationFailed) -> float:
    """For what was to take the place of something that serves."""
    if failure.is_final or failure.code == "cancelled":
        return math.inf
    return anyio.current_time() + _wait_s(attempts, RENEWAL_BASE_S, RENEWAL_CAP_S)


def _wait_s(attempts: int, base_s: float, cap_s: float) -> float:
    wait_s = min(cap_s, base_s * 2.0 ** min(attempts, 10))
    return random.uniform(wait_s / 2, wait_s)
