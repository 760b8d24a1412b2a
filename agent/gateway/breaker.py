"""May the primary be asked now? A circuit breaker as pure functions of what happened; times are seconds of one monotonic clock.

Closed: requests go to the primary. Open: none do, until the pause is over. Half-open: none do either, the node itself asks for one token,
and only `passes` good answers in a row close it again, so no client is used to try an ill primary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from agent.gateway.classify import Failure

DOUBT_S = 5.0


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """Opens when failures in a row weigh `opens_at`, or `share` of the last `window` answers (at least `least`) failed.

    The pause doubles from `first_pause_s` to `longest_pause_s` while the primary fails again within `steady_s` of its return.
    """

    opens_at: float = 3.0
    window: int = 20
    least: int = 10
    share: float = 0.5
    first_pause_s: float = 5.0
    longest_pause_s: float = 60.0
    steady_s: float = 60.0
    passes: int = 2
    pass_gap_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Closed:
    """`recent`: True for each of the last answers that was good; `pause_s`: the pause before this state, 0 if it never opened."""

    since_s: float = 0.0
    weight: float = 0.0
    recent: tuple[bool, ...] = ()
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Open:
    """`since_s` is the beginning of the outage, over all its trials."""

    since_s: float
    until_s: float
    pause_s: float
    cause: Failure


@dataclass(frozen=True, slots=True)
class HalfOpen:
    since_s: float
    next_s: float
    pause_s: float
    cause: Failure
    passes: int = 0


Breaker = Closed | Open | HalfOpen


def tick(state: Breaker, now_s: float) -> Breaker:
    """The state once the clock is seen: a pause that is over leads to trials."""
    if isinstance(state, Open) and now_s >= state.until_s:
        return HalfOpen(state.since_s, now_s, state.pause_s, state.cause)
    return state


def succeeded(state: Breaker, now_s: float, policy: BreakerPolicy, by_probe: bool) -> Breaker:
    """After a good answer. One that was begun before the outage says nothing about its end."""
    match state:
        case Closed():
            return replace(state, weight=0.0, recent=_remember(state.recent, True, policy))
        case HalfOpen() if by_probe:
            passes = state.passes + 1
            if passes >= policy.passes:
                return Closed(since_s=now_s, pause_s=state.pause_s)
            return replace(state, passes=passes, next_s=now_s + policy.pass_gap_s)
        case _:
            return state


def failed(state: Breaker, failure: Failure, now_s: float, policy: BreakerPolicy, draw: float, by_probe: bool) -> Breaker:
    """After a failure. `draw`, evenly from 0 to 1, spreads the trials of a fleet."""
    if failure.weight == 0:
        return replace(state, next_s=now_s + policy.pass_gap_s) if isinstance(state, HalfOpen) and by_probe else state
    match state:
        case Closed():
            weight, recent = state.weight + failure.weight, _remember(state.recent, False, policy)
            is_mostly_bad = len(recent) >= policy.least and recent.count(False) >= policy.share * len(recent)
            if weight < policy.opens_at and not is_mostly_bad:
                return replace(state, weight=weight, recent=recent)
            is_relapse = state.pause_s > 0 and now_s - state.since_s < policy.steady_s
            return _open(now_s, now_s, 2 * state.pause_s if is_relapse else policy.first_pause_s, failure, policy, draw)
        case HalfOpen() if by_probe:
            return _open(state.since_s, now_s, 2 * state.pause_s, failure, policy, draw)
        case _:
            return state


def next_look_s(state: Breaker, evidence_s: float, interval_s: float) -> float:
    """When the next probe, or the end of the pause, is due. `evidence_s`: the last good answer or probe; a failure since is a doubt."""
    match state:
        case Closed(weight=weight):
            return evidence_s + (min(interval_s, DOUBT_S) if weight else interval_s)
        case Open():
            return state.until_s
        case HalfOpen():
            return state.next_s


def _open(since_s: float, now_s: float, pause_s: float, failure: Failure, policy: BreakerPolicy, draw: float) -> Open:
    pause_s = min(pause_s, policy.longest_pause_s)
    jittered_s = pause_s * (0.5 + 0.5 * draw)
    stated_s = max(failure.retry_after_s or 0.0, failure.facts.pause_s) * (1 + 0.1 * draw)
    return Open(since_s, now_s + max(jittered_s, stated_s), pause_s, failure)


def _remember(recent: tuple[bool, ...], is_good: bool, policy: BreakerPolicy) -> tuple[bool, ...]:
    return (*recent, is_good)[-policy.window :]


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """Second attempts as a share of requests: each request adds `share`, each retry takes 1; at most `most` are saved up."""

    share: float = 0.1
    most: float = 10.0
    left: float = 1.0

    def asked(self) -> RetryBudget:
        return replace(self, left=min(self.most, self.left + self.share))

    def spent(self) -> RetryBudget | None:
        """None: there is none left."""
        return replace(self, left=self.left - 1.0) if self.left >= 1.0 else None
