"""How much the holder of a key may still ask: token buckets, pure; and the state of all keys, which the door asks.

https://en.wikipedia.org/wiki/Token_bucket: a bucket holds a minute's worth and fills evenly, so that a minute may begin with all of it at
once. Requests are paid before, tokens after, for nobody knows how many an answer takes: a bucket may be overdrawn, and is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from agent.http.errors import ApiError, retry_after
from agent.http.keys import KeyRules, Keys

MINUTE_S = 60.0
ROUNDING = 1e-6  # of a token: whoever has waited as told has enough


@dataclass(frozen=True, slots=True)
class Bucket:
    """`level` at `at_s`; of a limit of `per_minute`."""

    level: float
    at_s: float

    def filled(self, per_minute: int, now_s: float) -> Bucket:
        passed_s = max(0.0, now_s - self.at_s)
        return Bucket(min(float(per_minute), self.level + passed_s * per_minute / MINUTE_S), max(now_s, self.at_s))

    def less(self, cost: float) -> Bucket:
        return replace(self, level=self.level - cost)

    def wait_s(self, cost: float, per_minute: int) -> float:
        """Until there is enough for `cost`; 0: now."""
        lacks = cost - self.level
        return lacks * MINUTE_S / per_minute if lacks > ROUNDING else 0.0


@dataclass(slots=True)
class _Holder:
    rules: KeyRules
    requests: Bucket
    tokens: Bucket
    running: int = 0


class Allowances:
    """Of each key what is left. `enter` raises ApiError (429) and otherwise must be followed by `leave` with the tokens that were used."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._holders: dict[bytes, _Holder] = {}

    def enter(self, digest: bytes, keys: Keys) -> None:
        holder = self._holder(digest, keys)
        if problem := _problem(holder):
            raise problem
        if holder.rules.requests_per_minute:
            holder.requests = holder.requests.less(1)
        holder.running += 1

    def _holder(self, digest: bytes, keys: Keys) -> _Holder:
        """By the rules of now, with its buckets filled."""
        rules, now_s = keys[digest], self._clock()
        holder = self._holders.get(digest)
        if holder is None or holder.rules != rules:  # new limits begin with a full bucket
            running = holder.running if holder else 0
            holder = _Holder(rules, Bucket(rules.requests_per_minute, now_s), Bucket(rules.tokens_per_minute, now_s), running)
            self._holders = {known: each for known, each in self._holders.items() if known in keys or each.running}
            self._holders[digest] = holder
        holder.requests = holder.requests.filled(rules.requests_per_minute, now_s)
        holder.tokens = holder.tokens.filled(rules.tokens_per_minute, now_s)
        return holder

    def leave(self, digest: bytes, tokens: int) -> None:
        self._holders[digest].running -= 1
        self.pay(digest, tokens)

    def overdrawn_s(self, digest: bytes, keys: Keys) -> float:
        """Until a key may use tokens again; 0: now. For what is no request of its own: the line of a batch."""
        holder = self._holder(digest, keys)
        return holder.tokens.wait_s(1, holder.rules.tokens_per_minute) if holder.rules.tokens_per_minute else 0.0

    def pay(self, digest: bytes, tokens: int) -> None:
        """For a key that was let in, or was not overdrawn; one that was struck off since owes nothing."""
        holder = self._holders.get(digest)
        if holder is not None and holder.rules.tokens_per_minute:
            holder.tokens = holder.tokens.less(tokens)


def _problem(holder: _Holder) -> ApiError | None:
    rules = holder.rules
    if rules.concurrent and holder.running >= rules.concurrent:
        return _too_many(rules, "requests", f"{holder.running} requests at the same time, its limit", 1.0)
    if rules.requests_per_minute and (wait_s := holder.requests.wait_s(1, rules.requests_per_minute)):
        return _too_many(rules, "requests", f"used its {rules.requests_per_minute} requests a minute", wait_s)
    if rules.tokens_per_minute and (wait_s := holder.tokens.wait_s(1, rules.tokens_per_minute)):
        return _too_many(rules, "tokens", f"used its {rules.tokens_per_minute} tokens a minute", wait_s)
    return None


def _too_many(rules: KeyRules, what: str, words: str, wait_s: float) -> ApiError:
    """As OpenAI says it: the type names what ran out."""
    who = f"the key {rules.name}" if rules.name else "this key"
    return ApiError(
        429, f"{who} has {words}; ask again in {math.ceil(wait_s)} s", type_=what, code="rate_limit_exceeded",
        headers={"Retry-After": retry_after(wait_s)},
    )  # fmt: skip
