"""When a dead worker is started again. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Delays are drawn evenly from 0 to min(cap, first · 2ⁿ) for the n-th crash in a row ("full jitter",
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    After `crashes` within `window_s` the worker is quarantined: it rests for `quarantine_s`, for a device in the field has nobody to
    press a button. A worker that lived for `stable_s` begins again with the first delay.
    """

    first_s: float = 0.5
    cap_s: float = 30.0
    crashes: int = 5
    window_s: float = 300.0
    stable_s: float = 60.0
    quarantine_s: float = 900.0


@dataclass(frozen=True, slots=True)
class History:
    """Monotonic times of the crashes in the window, and how many came in a row."""

    crashes: tuple[float, ...] = ()
    in_a_row: int = 0


@dataclass(frozen=True, slots=True)
class Restart:
    at_s: float


@dataclass(frozen=True, slots=True)
class Quarantine:
    until_s: float


def after_crash(
    policy: RestartPolicy, history: History, now_s: float, lived_s: float, uniform: Callable[[], float]
) -> tuple[History, Restart | Quarantine]:
    """What to do about a crash at `now_s` of a worker that was ready for `lived_s`; `uniform` draws from [0, 1)."""
    crashes = (*(at for at in history.crashes if now_s - at < policy.window_s), now_s)
    in_a_row = 0 if lived_s >= policy.stable_s else history.in_a_row
    if len(crashes) >= policy.crashes:
        return History(), Quarantine(now_s + policy.quarantine_s)
    delay_s = uniform() * min(policy.cap_s, policy.first_s * 2.0 ** min(in_a_row, 60))
    return History(crashes, in_a_row + 1), Restart(now_s + delay_s)
