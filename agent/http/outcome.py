"""Who answered a request and how it went: told in passing by whoever does it, read once by the front at the end."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

from starlette.types import Scope

Backend = Literal["primary", "local", "cache", "continued"]
KEY = "hotspare.answered"


@dataclass
class Answered:
    """`backend`: the header `x-hotspare-backend` takes it when the head is sent. `has_failed`: the answer broke after its head.

    `is_counted`: it got as far as being answered, so that its outcome says something of the service. `cloud_calls`: requests sent to the
    primary for this one; `cause`: why it did not answer, in the words of its class. `tenant`: whose request it is.
    `tokens`: read and written for it, which its key pays for. `ends_s`: when the client stops waiting, on the monotonic clock.
    `key`: SHA-256 of the API key that it came with, in hex; empty where none is asked for. `can_wait`: it is part of a batch.
    """

    backend: Backend = "local"
    has_failed: bool = False
    is_counted: bool = False
    cloud_calls: int = 0
    cause: str = ""
    tenant: str = ""
    tokens: int = 0
    ends_s: float = math.inf
    key: str = ""
    can_wait: bool = False

    def left_s(self, most_s: float) -> float:
        """Seconds until the client wants its answer, `most_s` at most; never none, so that what is late ends as such."""
        return max(0.001, min(most_s, self.ends_s - time.monotonic()))


@dataclass(frozen=True, slots=True)
class Outcome:
    """One inference request at its end. `first_ms`: until the first byte of the body; None where there was none."""

    backend: Backend
    is_good: bool
    latency_ms: float
    first_ms: float | None
    cloud_calls: int
    cause: str


def answered(scope: Scope) -> Answered:
    """The note of this request; a fresh one where no front has made it."""
    note = scope.setdefault(KEY, Answered())
    if not isinstance(note, Answered):
        raise TypeError(f"{KEY} in the scope is {type(note).__name__}")
    return note
