"""The node's mode as a pure function of what is known: health, lease, uplink, the primary's probes, the clock (L5-L9).

`standby` waits for a lease; `active` has a full one; `draining` finishes what is in flight and takes nothing new;
`autonomous` serves without a lease because neither coordinator nor primary can be reached; `starting` and `degraded`
cannot serve. A contingent lease lets a standby node serve at once when traffic comes (L7). A node without any broker
configured is *standalone*: nobody could ever give it a lease, so it is `active` for good.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from agent.protocol.lease import LeaseState
from agent.protocol.wire import Mode

Health = Literal["starting", "ready", "degraded"]
Reason = Literal[
    "starting", "unhealthy", "standalone", "lease", "contingent_lease", "no_lease", "drained", "primary_down", "lease_ended"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Autonomy:
    """That this node decided by itself to serve: at which epoch, and how much of its time earlier lives used up (L8)."""

    epoch: int
    spent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ModePolicy:
    """`primary_failures` and `primary_passes` are probes in a row."""

    is_standalone: bool = False
    primary_failures: int = 3
    primary_passes: int = 4
    autonomous_max_s: float = 24 * 3600.0
    drain_max_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Facts:
    now_s: float
    lease: LeaseState
    health: Health
    coordinator_is_reachable: bool
    primary_failures: int
    primary_passes: int
    inflight: int


@dataclass(frozen=True, slots=True)
class ModeState:
    """`since_s` is when the mode began, `ends_s` when draining ends at the latest; both on the boot clock."""

    mode: Mode = "starting"
    reason: Reason = "starting"
    since_s: float = 0.0
    ends_s: float = 0.0
    lease: LeaseState = field(default_factory=LeaseState)
    autonomy: Autonomy | None = None
    autonomous_since_s: float = 0.0
    autonomy_is_spent: bool = False


@dataclass(frozen=True, slots=True)
class Allowed:
    pass


@dataclass(frozen=True, slots=True)
class Refused:
    """What the gate answers with: 503, Retry-After, and the mode in a header (L6)."""

    retry_after_s: int
    mode: Mode
    reason: Reason


RETRY_AFTER_S: dict[Mode, int] = {"starting": 5, "standby": 30, "active": 5, "autonomous": 5, "draining": 5, "degraded": 30}


def advance(state: ModeState, facts: Facts, policy: ModePolicy) -> ModeState:
    """The next state; the same one, field by field, when nothing changed."""
    state = _with_autonomy(replace(state, lease=facts.lease), facts, policy)
    mode, reason = _wanted(state, facts, policy)
    if mode == "standby" and state.mode in ("active", "autonomous"):
        return replace(state, mode="draining", reason=reason, since_s=facts.now_s, ends_s=facts.now_s + policy.drain_max_s)
    if mode == "standby" and state.mode == "draining" and facts.inflight > 0 and facts.now_s < state.ends_s:
        return replace(state, reason=reason)
    since_s = state.since_s if mode == state.mode else facts.now_s
    return replace(state, mode=mode, reason=reason, since_s=since_s)


def may_serve(state: ModeState, now_s: float) -> Allowed | Refused:
    """The gate at the data plane (L6): asks the lease itself, so that a late tick never serves beyond its end."""
    is_held = state.lease.held(now_s) is not None
    match state.mode:
        case "autonomous":
            return Allowed()
        case "active" if is_held or state.reason == "standalone":
            return Allowed()
        case "standby" if is_held:
            return Allowed()
        case "active":
            return Refused(RETRY_AFTER_S["active"], "active", "lease_ended")
        case mode:
            return Refused(RETRY_AFTER_S[mode], mode, "no_lease" if state.reason == "contingent_lease" else state.reason)


def _wanted(state: ModeState, facts: Facts, policy: ModePolicy) -> tuple[Mode, Reason]:
    held = facts.lease.held(facts.now_s)
    rows: tuple[tuple[bool, Mode, Reason], ...] = (
        (facts.health == "starting", "starting", "starting"),
        (facts.health == "degraded", "degraded", "unhealthy"),
        (policy.is_standalone, "active", "standalone"),
        (held == "full", "active", "lease"),
        (state.autonomy is not None, "autonomous", "primary_down"),
        (held == "contingent", "standby", "contingent_lease"),
        (facts.lease.is_drained, "standby", "drained"),
        (facts.lease.kind is not None, "standby", "lease_ended"),
        (True, "standby", "no_lease"),
    )
    return next((mode, reason) for holds, mode, reason in rows if holds)


def _with_autonomy(state: ModeState, facts: Facts, policy: ModePolicy) -> ModeState:
    primary_is_back = facts.primary_passes >= policy.primary_passes
    if state.autonomy is not None:
        spent_s = state.autonomy.spent_s + facts.now_s - state.autonomous_since_s
        if facts.lease.epoch > state.autonomy.epoch or primary_is_back:
            return replace(state, autonomy=None)
        if spent_s >= policy.autonomous_max_s:
            return replace(state, autonomy=None, autonomy_is_spent=True)
        return state
    if facts.coordinator_is_reachable or primary_is_back:
        return replace(state, autonomy_is_spent=False)
    may_begin = not (policy.is_standalone or state.autonomy_is_spent or facts.lease.is_drained or facts.lease.held(facts.now_s) == "full")
    if may_begin and facts.primary_failures >= policy.primary_failures:
        return replace(state, autonomy=Autonomy(facts.lease.epoch), autonomous_since_s=facts.now_s)
    return state
