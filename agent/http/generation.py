"""One choice after another out of a text service, as whole answers or as pieces; the same for chat, completions and batches."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from agent.http.collaborators import Sampling, TextDelta, TextService, TokenLogprob, Usage
from agent.http.metrics import Metrics
from agent.http.outcome import Answered
from agent.http.requests import SamplingBody
from agent.http.streams import all_of, closing

BATCH_PRIORITY = -1  # chats come first


@dataclass(frozen=True)
class Caller:
    """Whose request it is and how urgent: a batch can wait for chats."""

    note: Answered = field(default_factory=Answered)

    @property
    def priority(self) -> int:
        return BATCH_PRIORITY if self.note.can_wait else 0

    @property
    def tenant(self) -> str:
        return self.note.tenant


ANYBODY = Caller()


@dataclass(frozen=True)
class Job:
    """Choice number `index` of an answer. `note`: of the request that it is made for."""

    index: int
    prompt: Sequence[int]
    sampling: Sampling
    continues: bool = False
    note: Answered = field(default_factory=Answered)


@dataclass(frozen=True)
class Choice:
    index: int
    text: str
    finish: str
    logprobs: tuple[TokenLogprob, ...]
    usage: Usage


def jobs_of(prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, caller: Caller, continues: bool = False) -> list[Job]:
    """`n` choices of each prompt, numbered as OpenAI does; with a seed, each of the `n` gets one of its own."""
    jobs = []
    for number, prompt in enumerate(prompts):
        for repeat in range(n):
            seed = None if sampling.seed is None else (sampling.seed + repeat) % (1 << 63)  # negative ones are OpenAI's, not numpy's
            jobs.append(Job(number * n + repeat, prompt, replace(sampling, seed=seed), continues, caller.note))
    return jobs


def sampling_of(
    body: SamplingBody, max_tokens: int | None, caller: Caller = ANYBODY, top_logprobs: int = -1, grammar: str = "", adapter: str = ""
) -> Sampling:
    """None where the request is silent: the service takes the model's own default."""
    return Sampling(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        stop=body.stops,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        top_logprobs=top_logprobs,
        priority=caller.priority,
        logit_bias=body.biases,
        grammar=grammar,
        adapter=adapter,
        tenant=caller.tenant,
        deadline_s=caller.note.left_s(Sampling.deadline_s),
    )


async def follow(text: TextService, metrics: Metrics, model: str, job: Job, each: Callable[[TextDelta], Awaitable[None]]) -> Usage:
    """Run one job, hand on each delta, count its tokens. Raises AgentError."""
    started_s, usage, is_first = time.monotonic(), Usage(len(job.prompt), 0), True
    try:
        async with closing(text.generate(model, job.prompt, job.sampling, job.continues)) as deltas:
            async for delta in deltas:
                if is_first and (delta.text or delta.finish):
                    metrics.first_token_s.labels(model).observe(time.monotonic() - started_s)
                    is_first = False
                usage = delta.usage or replace(usage, completion_tokens=usage.completion_tokens + 1)
                await each(delta)
    finally:  # who leaves early pays for what was made until then
        job.note.tokens += 0 if is_first else usage.prompt_tokens + usage.completion_tokens
    if usage.queued_s is not None:
        metrics.queue_s.labels(model).observe(usage.queued_s)
    metrics.tokens.labels(model, "prompt").inc(usage.prompt_tokens)
    metrics.tokens.labels(model, "cached").inc(usage.cached_tokens)
    metrics.tokens.labels(model, "completion").inc(usage.completion_tokens)
    return usage


async def complete(text: TextService, metrics: Metrics, model: str, job: Job) -> Choice:
    """The whole answer of one job. Raises AgentError."""
    pieces: list[str] = []
    logprobs: list[TokenLogprob] = []
    finish = "stop"

    async def keep(delta: TextDelta) -> None:
        nonlocal finish
        pieces.append(delta.text)
        logprobs.extend(delta.logprobs)
        finish = delta.finish or finish

    usage = await follow(text, metrics, model, job, keep)
    return Choice(job.index, "".join(pieces), finish, tuple(logprobs), usage)


async def complete_all(text: TextService, metrics: Metrics, model: str, jobs: Sequence[Job]) -> list[Choice]:
    """The whole answers of several jobs of one request: side by side, or, of a line of a batch, one after another, so that it never takes
    more than one place. Raises AgentError."""
    calls = [partial(complete, text, metrics, model, job) for job in jobs]
    if any(job.note.can_wait for job in jobs):
        return [await call() for call in calls]
    return await all_of(*calls)


def usage_of(usages: Sequence[Usage], prompts: int) -> dict[str, Any]:
    """OpenAI's usage object and DeepSeek's cache fields. A prompt with several choices counts once, like at OpenAI."""
    repeats = max(1, len(usages) // max(1, prompts))
    read = sum(usage.prompt_tokens for usage in usages[::repeats])
    cached = sum(usage.cached_tokens for usage in usages[::repeats])
    written = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": read - cached,
    }


def chat_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            {
                "token": entry.token,
                "logprob": entry.logprob,
                "bytes": list(entry.raw),
                "top_logprobs": [{"token": token, "logprob": logprob, "bytes": list(raw)} for token, raw, logprob in entry.top],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def completion_logprobs(entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """The older shape of /v1/completions; `offset`: characters of the text before these tokens."""
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.token)
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{token: logprob for token, _, logprob in entry.top} for entry in entries],
        "text_offset": offsets,
    }
