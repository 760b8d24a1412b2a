"""How long to wait before the next connection: full jitter, and longer when sessions die young. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """Three sessions in a row under `young_s`: somebody else uses our name, or an ACL throws us out. Slow down and say so."""

    base_s: float = 1.0
    cap_s: float = 60.0
    takeover_cap_s: float = 300.0
    young_s: float = 5.0
    young_limit: int = 3


@dataclass(frozen=True, slots=True)
class Backoff:
    failures: int = 0
    young_sessions: int = 0


def after_failure(state: Backoff) -> Backoff:
    """No connection came about."""
    return replace(state, failures=state.failures + 1)


def after_session(state: Backoff, lived_s: float, policy: BackoffPolicy) -> Backoff:
    if lived_s >= policy.young_s:
        return Backoff()
    return Backoff(state.failures + 1, state.young_sessions + 1)


def is_contested(state: Backoff, policy: BackoffPolicy) -> bool:
    return state.young_sessions >= policy.young_limit


def delay_s(state: Backoff, policy: BackoffPolicy, chance: float) -> float:
    """`chance` in [0, 1). Full jitter: anything from nothing to the bound (AWS architecture blog, 2015)."""
    cap_s = policy.takeover_cap_s if is_contested(state, policy) else policy.cap_s
    return chance * min(cap_s, policy.base_s * 2.0 ** min(state.failures, 16))
