"""The codes of the mode machine in words, for error messages, /readyz and the page."""

from __future__ import annotations

from agent.mode import Reason

WORDS: dict[Reason, str] = {
    "starting": "it is still loading its models",
    "unhealthy": "a worker or a model that it needs is not healthy",
    "standalone": "no coordinator is configured, so it always serves",
    "lease": "the coordinator gave it the lease",
    "contingent_lease": "it stands by, and serves at once what a balancer sends it",
    "no_lease": "it holds no lease; the coordinator gives it one when the primary fails",
    "drained": "it was taken out of service until the next order of the coordinator",
    "primary_down": "neither the coordinator nor the primary answers, so it serves on its own account",
    "lease_ended": "its lease ended and was not renewed",
}
