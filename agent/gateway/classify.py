"""What a failure of the primary is, from a status, an exception or a silence; and what follows from it. Pure."""

from __future__ import annotations

import email.utils
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

import httpx

Kind = Literal[
    "refused", "dns", "tls", "connect_timeout", "closed", "unauthorised", "no_balance", "rate_limited", "server_error",
    "first_byte_timeout", "first_token_timeout", "keep_alive_only", "stalled", "cut", "malformed", "too_long",
]  # fmt: skip

LONGEST_RETRY_AFTER_S = 600.0
# DeepSeek: the model was interrupted for want of resources; the text that came with it is not an answer.
FAILED_FINISHES = frozenset({"insufficient_system_resource"})


class Facts(NamedTuple):
    """`weight`: how much it adds to the breaker; `pause_s`: the least time the primary is left alone if that opens it; `is_quick`: it shows
    at once, so asking once more costs a client nothing."""

    weight: float
    pause_s: float
    is_quick: bool
    words: str


# A failure that a client has waited for weighs more, since the next client would wait again. One that only people can mend opens at once.
FACTS: dict[Kind, Facts] = {
    "refused": Facts(1.0, 0, True, "the connection was refused"),
    "dns": Facts(1.0, 0, False, "its name has no address"),
    "tls": Facts(3.0, 30, False, "its certificate or TLS is not accepted"),
    "connect_timeout": Facts(1.5, 0, False, "no connection in time"),
    "closed": Facts(1.0, 0, True, "it closed the connection without an answer"),
    "unauthorised": Facts(3.0, 300, False, "it does not accept this node's key: put a valid one into gateway.key_file"),
    "no_balance": Facts(3.0, 300, False, "the balance of its account is used up"),
    "rate_limited": Facts(1.0, 0, False, "its limit of requests is reached"),
    "server_error": Facts(1.0, 0, True, "it failed"),
    "first_byte_timeout": Facts(1.5, 0, False, "it took the request and did not begin to answer"),
    "first_token_timeout": Facts(1.5, 0, False, "it began to answer and sent no token"),
    "keep_alive_only": Facts(1.5, 0, False, "it sent keep-alive comments and no token"),
    "stalled": Facts(1.5, 0, False, "it stopped sending tokens in the middle of an answer"),
    "cut": Facts(1.0, 0, False, "it broke off in the middle of an answer"),
    "malformed": Facts(1.0, 0, True, "what it sent is no answer"),
    "too_long": Facts(1.0, 0, False, "its answer was not complete in time"),
}


@dataclass(frozen=True, slots=True)
class Failure:
    """`detail` is for people and holds neither key nor prompt; `weight` is 0 where the fault is one client's account, not the primary."""

    kind: Kind
    detail: str = ""
    retry_after_s: float | None = None
    weight: float = -1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            object.__setattr__(self, "weight", FACTS[self.kind].weight)

    @property
    def facts(self) -> Facts:
        return FACTS[self.kind]

    @property
    def words(self) -> str:
        return f"{self.facts.words}{f' ({self.detail})' if self.detail else ''}"


class PrimaryFailed(Exception):
    """The primary gave no answer that a client could be given."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.words)
        self.failure = failure


def failure_of_status(status: int, headers: Mapping[str, str], key_is_ours: bool, now: datetime) -> Failure | None:
    """None: the answer is the client's, be it 200 or a refusal of what the client sent (400, 404, 413, 422 and the like).

    https://api-docs.deepseek.com/quick_start/error_codes. With the client's own key, 401 and 403 are the client's too, and 402 or 429 say
    nothing of the primary's health: that request is answered here, the next client's may still pass.
    """
    detail = f"HTTP {status}"
    if status in (401, 403):
        return Failure("unauthorised", detail) if key_is_ours else None
    if status in (402, 429):
        after_s = retry_after_s(headers.get("retry-after"), now)
        kind: Kind = "no_balance" if status == 402 else "rate_limited"
        # A stated time is an order: until then every request would be refused.
        weight = (FACTS["tls"].weight if after_s else FACTS[kind].weight) if key_is_ours else 0.0
        return Failure(kind, detail, after_s, weight)
    if status == 408 or status >= 500:
        after_s = retry_after_s(headers.get("retry-after"), now)
        return Failure("server_error", detail, after_s)
    if status < 200 or 300 <= status < 400:
        return Failure("malformed", f"{detail}, which no API answers")
    return None


def failure_of_error(error: Exception, has_head: bool, has_token: bool) -> Failure:
    """The class of what httpx raised. `has_head`, `has_token`: what had arrived before."""
    detail = type(error).__name__
    causes = tuple(_causes(error))
    if isinstance(error, httpx.PoolTimeout):
        return Failure("connect_timeout", "this node has no connection left to ask it on", weight=0.0)
    if isinstance(error, httpx.ConnectTimeout):
        return Failure("connect_timeout", detail)
    if any(isinstance(cause, ssl.SSLError) for cause in causes) and not has_head:
        return Failure("tls", _first_line(causes[-1]))
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return Failure("dns", detail)
    if isinstance(error, httpx.ConnectError):
        return Failure("refused", _first_line(error))
    if has_token:
        return Failure("cut", detail)
    if isinstance(error, httpx.TimeoutException):
        return Failure("first_token_timeout" if has_head else "first_byte_timeout", detail)
    if isinstance(error, (httpx.RemoteProtocolError, httpx.DecodingError)) and "disconnected" not in str(error):
        return Failure("closed" if "closed" in str(error) else "malformed", _first_line(error))
    return Failure("closed", detail)


def retry_after_s(value: str | None, now: datetime) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110, 10.2.3), at most ten minutes; None for none and for nonsense."""
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), LONGEST_RETRY_AFTER_S)
    try:
        until = email.utils.parsedate_to_datetime(text)
        return min(max(0.0, (until - now).total_seconds()), LONGEST_RETRY_AFTER_S)
    except (ValueError, TypeError, OverflowError):
        return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
