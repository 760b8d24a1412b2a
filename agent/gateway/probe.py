"""Is the primary able to answer? A real, tiny completion: a port that accepts says nothing (text serving hangs, balances run out)."""

from __future__ import annotations

from dataclasses import dataclass

import anyio
import httpx

from agent.gateway.classify import Failure, failure_of_error, failure_of_status
from agent.protocol.wire import wire_now


@dataclass(frozen=True, slots=True)
class Probe:
    """The outcome of one probe; `reason` is for people and holds no secret. `failure`: the class of a bad one, for the breaker."""

    is_good: bool
    latency_ms: float
    reason: str
    failure: Failure | None = None


async def probe_primary(client: httpx.AsyncClient, url: str, model: str, key: str, timeout_s: float) -> Probe:
    """Ask for one token. 400 and 422 mean that the service works but dislikes the question: good. Everything else but 200 is a failure."""
    started_s = anyio.current_time()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"model": model, "messages": [{"role": "user", "content": "ping"}], "max_tokens": 1, "temperature": 0}
    failure: Failure | None = None
    try:
        with anyio.fail_after(timeout_s):
            answer = await client.post(f"{url.rstrip('/')}/v1/chat/completions", json=body, headers=headers, timeout=timeout_s)
        reason = f"HTTP {answer.status_code}"
        is_good = answer.status_code in (400, 422) or (answer.status_code == 200 and bool(answer.json().get("choices")))
        if not is_good:
            failure = failure_of_status(answer.status_code, answer.headers, bool(key), wire_now()) or Failure("malformed", reason)
    except (TimeoutError, httpx.TimeoutException):
        is_good, reason = False, f"no answer in {timeout_s:g} s"
        failure = Failure("first_byte_timeout", reason)
    except httpx.HTTPError as error:
        is_good, reason = False, f"{type(error).__name__}: {error}"
        failure = failure_of_error(error, has_head=False, has_token=False)
    except (ValueError, AttributeError) as error:
        is_good, reason = False, f"{type(error).__name__}: {error}"
        failure = Failure("malformed", type(error).__name__)
    return Probe(is_good, (anyio.current_time() - started_s) * 1000, reason, failure)
