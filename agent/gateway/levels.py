"""What an hour of answers came to: counts by who answered, calls to the cloud, and two histograms. Pure.

Histograms keep no single request, so a month of hours is some hundred kilobytes however many clients there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.http.outcome import Outcome

# Upper ends in milliseconds, each 1.5 times the one before: a quantile is right within a factor of 1.25.
BOUNDS_MS = tuple(round(1.5**step, 2) for step in range(34))
ANSWERS = ("primary", "local", "cache", "continued", "failed")
AVAILABILITY_TARGET = 0.9999
SAVED_TARGET = 0.30


@dataclass
class Hour:
    """`saved`: answered well without a call to the cloud. `latency`, `first`: how many answers lie in each bucket, the last one open."""

    answers: dict[str, int] = field(default_factory=dict)
    cloud_calls: int = 0
    saved: int = 0
    latency: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_MS) + 1))
    first: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_MS) + 1))

    def add(self, outcome: Outcome) -> None:
        answer = outcome.backend if outcome.is_good else "failed"
        self.answers[answer] = self.answers.get(answer, 0) + 1
        self.cloud_calls += outcome.cloud_calls
        self.saved += outcome.is_good and outcome.cloud_calls == 0
        self.latency[_bucket(outcome.latency_ms)] += 1
        if outcome.first_ms is not None:
            self.first[_bucket(outcome.first_ms)] += 1

    def packed(self) -> dict[str, Any]:
        return {
            "answers": self.answers,
            "cloud_calls": self.cloud_calls,
            "saved": self.saved,
            "latency": self.latency,
            "first": self.first,
        }

    @classmethod
    def unpacked(cls, values: Any) -> Hour:
        """Raises ValueError for what is no hour of ours."""
        try:
            hour = cls(
                {str(name): int(count) for name, count in values["answers"].items() if name in ANSWERS},
                int(values["cloud_calls"]),
                int(values["saved"]),
                [int(count) for count in values["latency"]],
                [int(count) for count in values["first"]],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no hour: {error}") from error
        if len(hour.latency) != len(BOUNDS_MS) + 1 or len(hour.first) != len(BOUNDS_MS) + 1:
            raise ValueError("an hour with other buckets")
        return hour


def total(hours: Iterable[Hour]) -> Hour:
    result = Hour()
    for hour in hours:
        for name, count in hour.answers.items():
            result.answers[name] = result.answers.get(name, 0) + count
        result.cloud_calls += hour.cloud_calls
        result.saved += hour.saved
        result.latency = [a + b for a, b in zip(result.latency, hour.latency, strict=True)]
        result.first = [a + b for a, b in zip(result.first, hour.first, strict=True)]
    return result


def told(hour: Hour) -> Mapping[str, Any]:
    """For people and clients; shares are None where nothing was asked."""
    requests = sum(hour.answers.values())
    good = requests - hour.answers.get("failed", 0)
    return {
        "requests": requests,
        **{name: hour.answers.get(name, 0) for name in ANSWERS},
        "availability": good / requests if requests else None,
        "cloud_calls": hour.cloud_calls,
        "saved_cloud_calls": hour.saved,
        "saved_share": hour.saved / requests if requests else None,
        "latency_ms": _quantiles(hour.latency),
        "first_token_ms": _quantiles(hour.first),
    }


def _bucket(value_ms: float) -> int:
    return next((index for index, bound in enumerate(BOUNDS_MS) if value_ms <= bound), len(BOUNDS_MS))


def _quantiles(counts: Sequence[int]) -> dict[str, float | None]:
    return {name: _quantile(counts, share) for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}


def _quantile(counts: Sequence[int], share: float) -> float | None:
    """The middle of the bucket that holds it."""
    left = share * sum(counts)
    if left == 0:
        return None
    for index, count in enumerate(counts):
        left -= count
        if left <= 0:
            upper = BOUNDS_MS[min(index, len(BOUNDS_MS) - 1)]
            return round(upper / 1.25, 2)
    return BOUNDS_MS[-1]
