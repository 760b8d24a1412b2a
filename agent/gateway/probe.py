"""Is the primary able to answer? A real, tiny completion: a port that accepts says nothing (text serving hangs, balances run out)."""

from __future__ import annotations

from dataclasses import dataclass

import anyio
import httpx


@dataclass(frozen=True, slots=True)
class Probe:
    """The outcome of one probe; `reason` is for people and holds no secret."""

    is_good: bool
    latency_ms: float
    reason: str


async def probe_primary(client: httpx.AsyncClient, url: str, model: str, key: str, timeout_s: float) -> Probe:
    """Ask for one token. 400 and 422 mean that the service works but dislikes the question: good. Everything else but 200 is a failure."""
    started_s = anyio.current_time()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"model": model, "messages": [{"role": "user", "content": "ping"}], "max_tokens": 1, "temperature": 0}
    try:
        with anyio.fail_after(timeout_s):
            answer = await client.post(f"{url.rstrip('/')}/v1/chat/completions", json=body, headers=headers, timeout=timeout_s)
        is_good = answer.status_code in (400, 422) or (answer.status_code == 200 and bool(answer.json().get("choices")))
        reason = f"HTTP {answer.status_code}"
    except (TimeoutError, httpx.TimeoutException):
        is_good, reason = False, f"no answer in {timeout_s:g} s"
    except (httpx.HTTPError, ValueError, AttributeError) as error:
        is_good, reason = False, f"{type(error).__name__}: {error}"
    return Probe(is_good, (anyio.current_time() - started_s) * 1000, reason)
