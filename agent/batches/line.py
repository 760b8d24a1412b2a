"""One line of a batch: how it is read, how its answer is written, and whether an answer is worth asking for again. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.batches.record import Counts, LineError

CUSTOM_ID_MAX = 512
NUMBER = re.compile(rb'^\{"id":"batch_req_[0-9a-f]+_([0-9]{1,9})",')

# How often a line is asked that failed with such a code: what passes is waited for until the window of the batch is over; what the line
# itself may have caused is tried a few times.
ATTEMPTS: Mapping[str, float] = {
    "busy": math.inf,
    "not_ready": math.inf,
    "cancelled": math.inf,
    "rate_limit_exceeded": math.inf,
    "deadline": 6,
    "worker_lost": 3,
    "internal_error": 3,  # a step of the engine failed, and with it every request in it
}
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0

TOLD_WHY: Mapping[str, str] = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request was not executed because the batch was cancelled.",
}


@dataclass(frozen=True, slots=True)
class Line:
    """`number` counts from 1. `body` is the request as JSON."""

    number: int
    custom_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """What the endpoint answered. `body` is JSON; `retry_s`: when it says to come back."""

    status: int
    body: bytes
    request_id: str
    retry_s: float = 0.0


def read_line(number: int, raw: bytes, endpoint: str) -> Line | LineError:
    """A line as it must be, or what is wrong with it. The body itself is the endpoint's to check."""

    def wrong(code: str, message: str, param: str | None = None) -> LineError:
        return LineError(code=code, message=message, line=number, param=param)

    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        return wrong("invalid_json_line", "This line is not parseable as valid JSON.")
    if not isinstance(fields, dict):
        return wrong("invalid_json_line", "This line is not a JSON object with custom_id, method, url and body.")
    custom_id, body = fields.get("custom_id"), fields.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= CUSTOM_ID_MAX:
        return wrong("missing_required_parameter", f"custom_id must be a text of 1 to {CUSTOM_ID_MAX} characters.", "custom_id")
    if fields.get("method") != "POST":
        return wrong("invalid_method", f"method is {_shown(fields.get('method'))}; only 'POST' is possible.", "method")
    if fields.get("url") != endpoint:
        return wrong("invalid_url", f"url is {_shown(fields.get('url'))}, the endpoint of this batch is {endpoint!r}.", "url")
    if not isinstance(body, dict):
        return wrong("missing_required_parameter", "body must be a JSON object, the request.", "body")
    if body.get("stream"):
        return wrong("unsupported_parameter", "stream must not be true: an answer in a file is whole.", "body.stream")
    return Line(number, custom_id, json.dumps(body, separators=(",", ":")).encode())


def _shown(value: Any) -> str:
    return repr(value)[:80] if value is not None else "missing"


def answered_line(batch: str, line: Line, reply: Reply) -> tuple[bytes, Counts]:
    """The line of the output file (200) or of the error file (any other status), and what it adds to the counts."""
    body = json.loads(reply.body)
    response = {"status_code": reply.status, "request_id": reply.request_id, "body": body}
    if reply.status != 200:
        return _written(batch, line, response, None), Counts(failed=1)
    return _written(batch, line, response, None), counted(body)


def unanswered_line(batch: str, line: Line, code: str) -> bytes:
    """The line of the error file for a request that never had its turn."""
    return _written(batch, line, None, {"code": code, "message": TOLD_WHY[code]})


def _written(batch: str, line: Line, response: Any, error: Any) -> bytes:
    fields = {
        "id": f"batch_req_{batch.removeprefix('batch_')}_{line.number}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def number_of(written: bytes) -> int | None:
    """Which line of the input a whole line of ours answers; None for what is none of ours, or not whole."""
    match = NUMBER.match(written)
    if match is None or not written.endswith(b"}\n"):
        return None
    return int(match[1])


def counted(body: Any) -> Counts:
    """The counts of one answer; usage has other words in the Responses API."""
    usage = body.get("usage") if isinstance(body, dict) else None
    usage = usage if isinstance(usage, dict) else {}

    def tokens(*names: str) -> int:
        return next((int(usage[name]) for name in names if isinstance(usage.get(name), int)), 0)

    def detail(part: str, name: str) -> int:
        details = usage.get(part)
        return int(details[name]) if isinstance(details, dict) and isinstance(details.get(name), int) else 0

    return Counts(
        completed=1,
        input_tokens=tokens("prompt_tokens", "input_tokens"),
        output_tokens=tokens("completion_tokens", "output_tokens"),
        cached_tokens=detail("prompt_tokens_details", "cached_tokens") or detail("input_tokens_details", "cached_tokens"),
        reasoning_tokens=detail("output_tokens_details", "reasoning_tokens"),
    )


def added(one: Counts, other: Counts) -> Counts:
    return Counts(**{name: getattr(one, name) + getattr(other, name) for name in Counts.model_fields})


def pause_s(reply: Reply, attempts: int) -> float | None:
    """Seconds until a line that was asked `attempts` times is asked again, before any jitter; None: this is its answer."""
    if attempts >= ATTEMPTS.get(_code(reply), 0):
        return None
    return min(LONGEST_PAUSE_S, max(reply.retry_s, FIRST_PAUSE_S * 2.0 ** min(max(0, attempts - 1), 10)))


def was_lost(reply: Reply) -> bool:
    """The worker died, or its engine failed, under this line, by its fault or another's."""
    return _code(reply) in ("worker_lost", "internal_error")


def _code(reply: Reply) -> str:
    """Of an error that may pass; empty for any other answer."""
    if reply.status not in (429, 500, 503, 504):
        return ""
    try:
        return str(json.loads(reply.body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""
