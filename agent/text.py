"""Text in, text out: chat templates and tokens on this side, a worker's token ids on the other, one retry where nobody would notice."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import anyio
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from agent.answer import Answer
from agent.errors import AgentError, WorkerLost, WorkerRefused
from agent.http.collaborators import Sampling, ServiceFailure, TextDelta
from agent.room import Room, is_hopeless
from agent.supervision.worker import Worker
from agent.tool_prompt import written_out
from agent.worker_protocol import Done, Encode, Generate, ProtocolError, Tokens
from models.chat_template import ChatTemplate, ChatTemplateError
from models.manifest import ClassificationManifest, EmbeddingManifest, GenerationManifest, Manifest
from models.tasks.classification import top_labels
from models.tokenizer import Tokenizer

Found = TypeVar("Found")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 1.0
CONTEXT_TOKENS = 8  # of a begun text: enough to hold its last character and the mark before its last word


@dataclass(frozen=True, slots=True)
class Served:
    """A model that is open in `worker` under its manifest's name, or will be when somebody asks (`is_asleep`). `context_tokens`: of one
    sequence, as the engine was opened."""

    worker: Worker
    manifest: Manifest
    folder: Path
    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    context_tokens: int = 0
    is_asleep: bool = False


class Embeddings(NamedTuple):
    """`rows` float32 [n, dimensions]; `tokens` that were computed."""

    rows: NDArray[np.float32]
    tokens: int


class Warmth(Protocol):
    """Who loads models that sleep; see agent/reconcile.py."""

    def using(self, model: str) -> AbstractContextManager[None]: ...

    def rouse(self, model: str) -> None: ...


class TextService:
    """`resolve` gives what serves a name or an alias, or raises ServiceFailure (unknown_model, not_ready).

    `warmth` is told what is used; a request for a model that sleeps waits until it is loaded, at most until its own deadline.
    A request whose worker dies before anything of the answer was given out is asked once more, at most `retry_s` later. All methods
    raise AgentError: ServiceFailure, WorkerRefused, WorkerLost.
    """

    def __init__(self, resolve: Callable[[str], Served], warmth: Warmth, retry_s: float = 30.0) -> None:
        self._resolve = resolve
        self._warmth = warmth
        self._retry_s = retry_s
        self._room = Room()

    def check_room(self, model: str, tenant: str, priority: int) -> None:
        """Raises WorkerRefused("busy") where the queue of the worker would refuse a request for certain, before any work is done on it."""
        served = self._resolve(model)
        name, status = served.manifest.name, served.worker.status
        told = status.models.get(name, {}) if status is not None else {}
        if "queue" in told and is_hopeless(self._room.places(name), tenant, priority, int(told["slots"]), int(told["queue"])):
            message = f"{told['queue']} requests wait already; try again later"
            raise WorkerRefused("busy", message, told.get("retry_after_s"))

    def chat_prompt(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
    ) -> list[int]:
        """The token ids of a conversation, ready to be answered. `thinking`: for models that can be told to think, or not to."""
        served = self._resolve(model)
        return _encode(served, _told(served, messages, tools, thinking), special=False)

    def begins_in_thoughts(self, model: str, thinking: bool | None = None) -> bool:
        """Whether the answer to a conversation begins within thoughts that the prompt has opened."""
        template = self._resolve(model).template
        return template is not None and template.opens_thoughts(**_switch(thinking))

    def continued_prompt(self, model: str, messages: Sequence[Mapping[str, Any]], said: str) -> tuple[list[int], int]:
        """The token ids of a conversation whose answer has begun with `said`, its turn still open; and how many of them are of `said`.

        Spaces at the end of `said` are left out: models continue from a word and write the space themselves. What was said are words and no
        thoughts, so those that a prompt opens are closed before it.
        """
        served = self._resolve(model)
        told = _told(served, messages, (), thinking=False)
        if told.rstrip().endswith("<think>"):
            told = f"{told.rstrip()}\n\n</think>\n\n"
        begun = _encode(served, told, special=False)
        if not said.strip():
            return begun, 0
        tokens = _encode(served, told + said.rstrip(" \n"), special=False)
        return tokens, len(tokens) - len(begun)

    def encode(self, model: str, text: str) -> list[int]:
        """The token ids of a plain text, with the opening mark if the model has one."""
        return _encode(self._resolve(model), text, special=True)

    async def generate(
        self, model: str, prompt_tokens: Sequence[int], sampling: Sampling, continues: bool = False
    ) -> AsyncGenerator[TextDelta, None]:
        """Continue a prompt. The last delta has `finish` and `usage`. Close it when you stop early: that ends the work on it.

        `continues`: the prompt ends inside a text, so the first piece keeps the space before its word.
        """
        prompt = tuple(prompt_tokens)
        payload = _int32(prompt)
        ends_at_s = time.monotonic() + sampling.deadline_s

        async def begin(served: Served) -> tuple[AsyncGenerator[Tokens | Done, None], Tokens | Done]:
            left_s = max(0.001, ends_at_s - time.monotonic())
            reports = served.worker.stream(_generate(served, prompt, sampling, left_s), payload, left_s)
            return reports, await anext(reports)

        self.check_room(model, sampling.tenant, sampling.priority)
        served = self._resolve(model)
        name = served.manifest.name
        answer = Answer(served.tokenizer, len(prompt), sampling.stop, prompt[-CONTEXT_TOKENS:] if continues else ())
        with self._warmth.using(name), self._room.taking(name, sampling.tenant, sampling.priority) as place:
            reports, report = await self._persist(model, ends_at_s, begin)
            async with aclosing(reports):
                while isinstance(report, Tokens):
                    place.has_begun = True
                    delta = answer.feed(report)
                    if delta.text or delta.logprobs:
                        yield delta
                    if answer.is_stopped:
                        break
                    report = await anext(reports)
        result = report.result if isinstance(report, Done) else {}
        yield answer.end(str(result.get("finish", "stop")), result.get("queued_s"))

    async def embed(self, model: str, inputs: Sequence[str | Sequence[int]], deadline_s: float = 60.0) -> Embeddings:
        """One vector per input; a text longer than the model reads is cut, as its authors do."""
        facts = _facts(self._resolve(model), EmbeddingManifest).embedding
        sequences = await self._sequences(model, inputs, facts.max_tokens)
        rows = await self._encode(model, sequences, deadline_s)
        return Embeddings(rows, sum(min(len(tokens), facts.max_tokens) for tokens in sequences))

    async def classify(self, model: str, inputs: Sequence[str], deadline_s: float = 60.0) -> list[list[tuple[str, float]]]:
        """Per input all labels with their probabilities, the likeliest first."""
        facts = _facts(self._resolve(model), ClassificationManifest).classification
        logits = await self._encode(model, await self._sequences(model, inputs, facts.max_tokens), deadline_s)
        return [[(item.label, item.score) for item in row] for row in top_labels(logits, facts.labels, len(facts.labels))]

    async def _sequences(self, model: str, inputs: Sequence[str | Sequence[int]], max_tokens: int) -> list[Sequence[int]]:
        tokenizer = self._resolve(model).tokenizer

        def tokenise() -> list[Sequence[int]]:
            return [tokenizer.encode(item, max_tokens=max_tokens) if isinstance(item, str) else item for item in inputs]

        sequences = await anyio.to_thread.run_sync(tokenise)
        for index, tokens in enumerate(sequences):
            if not tokens or min(tokens) < 0 or max(tokens) >= tokenizer.size:
                raise ServiceFailure("invalid", f"input[{index}] must have one token or more, each from 0 to {tokenizer.size - 1}")
        return sequences

    async def _encode(self, model: str, sequences: Sequence[Sequence[int]], deadline_s: float) -> NDArray[np.float32]:
        payload = b"".join(_int32(tokens) for tokens in sequences)
        ends_at_s = time.monotonic() + deadline_s

        async def ask(served: Served) -> tuple[Done, bytes]:
            left_s = max(0.001, ends_at_s - time.monotonic())
            lengths = tuple(len(tokens) for tokens in sequences)
            return await served.worker.call(Encode(0, served.manifest.name, lengths, left_s), payload, left_s)

        with self._warmth.using(self._resolve(model).manifest.name):
            done, rows = await self._persist(model, ends_at_s, ask)
        return np.frombuffer(rows, "<f4").reshape(len(sequences), int(done.result["columns"])).astype(np.float32, copy=False)

    async def _persist(self, model: str, ends_at_s: float, ask: Callable[[Served], Awaitable[Found]]) -> Found:
        """`ask`, and once more if the worker is lost under it, or the model slept, as soon as it is open (again)."""
        served = self._resolve(model)
        try:
            return await ask(served)
        except ProtocolError as error:
            raise ServiceFailure("invalid", str(error)) from error
        except WorkerLost as error:
            failure: AgentError = error
        except WorkerRefused as error:
            failure = _in_words_for_clients(error)
            if not _is_loading(failure):
                raise
        give_up_at_s = ends_at_s if served.is_asleep else min(ends_at_s, time.monotonic() + self._retry_s)
        return await self._again(model, served.worker, give_up_at_s, failure, ask)

    async def _again(
        self, model: str, worker: Worker, give_up_at_s: float, failure: AgentError, ask: Callable[[Served], Awaitable[Found]]
    ) -> Found:
        pause_s = FIRST_PAUSE_S
        while (left_s := give_up_at_s - time.monotonic()) > 0:
            try:
                await worker.until_running(left_s)
                served = self._resolve(model)
                self._warmth.rouse(served.manifest.name)
                return await ask(served)
            except (WorkerRefused, ServiceFailure) as error:
                failure = _in_words_for_clients(error)
                if not _is_loading(failure):
                    raise
            await anyio.sleep(min(left_s, random.random() * pause_s))
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        raise failure


def _told(served: Served, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], thinking: bool | None) -> str:
    _facts(served, GenerationManifest)
    template = served.template
    if template is None:
        raise ServiceFailure("invalid", f"{served.manifest.name} has no chat template; use /v1/completions")
    concerns_tools = bool(tools) or any(message["role"] == "tool" or "tool_calls" in message for message in messages)
    if concerns_tools and not template.writes_calls:
        messages, tools = written_out(messages, tools), ()
    try:
        return template.render(messages, tools or None, **_switch(thinking))
    except ChatTemplateError as error:
        raise ServiceFailure("invalid", f"messages: {error}") from error


def _switch(thinking: bool | None) -> dict[str, bool]:
    """As the templates of Qwen3 and its likes name it."""
    return {} if thinking is None else {"enable_thinking": thinking}


Kind = TypeVar("Kind", GenerationManifest, EmbeddingManifest, ClassificationManifest)


def _facts(served: Served, kind: type[Kind]) -> Kind:
    if not isinstance(served.manifest, kind):
        raise ServiceFailure("invalid", f"{served.manifest.name} is a model for {served.manifest.task} and cannot do this")
    return served.manifest


def _encode(served: Served, text: str, special: bool) -> list[int]:
    """Refuses what cannot fit before the work of encoding it, which would hold the event loop and take gigabytes for megabytes of text."""
    at_least = served.tokenizer.least_tokens(text)
    if served.context_tokens and at_least > served.context_tokens:
        raise ServiceFailure(
            "context_length_exceeded",
            f"the prompt has {len(text)} characters, at the least {at_least} tokens; prompt and answer together must fit into "
            f"{served.context_tokens} tokens",
        )
    return served.tokenizer.encode(text, special=special)


def _generate(served: Served, prompt: Sequence[int], sampling: Sampling, deadline_s: float) -> Generate:
    facts = _facts(served, GenerationManifest).generation
    room = served.context_tokens - len(prompt)
    if room < 1:
        raise ServiceFailure(
            "context_length_exceeded",
            f"the prompt has {len(prompt)} tokens; prompt and answer together must fit into {served.context_tokens} tokens",
        )
    return Generate(
        request=0,
        model=served.manifest.name,
        max_tokens=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
        temperature=facts.temperature if sampling.temperature is None else sampling.temperature,
        top_p=facts.top_p if sampling.top_p is None else sampling.top_p,
        top_k=sampling.top_k or 0,
        seed=sampling.seed,
        stop_tokens=served.tokenizer.eos_ids,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        top_logprobs=sampling.top_logprobs,
        priority=sampling.priority,
        deadline_s=deadline_s,
        logit_bias=sampling.logit_bias,
        grammar=sampling.grammar,
        adapter=sampling.adapter,
        tenant=sampling.tenant,
    )


def _in_words_for_clients(error: WorkerRefused | ServiceFailure) -> AgentError:
    """A model that is unknown to the worker but known to us: the worker was restarted and is loading again."""
    if isinstance(error, WorkerRefused) and error.reason == "unknown_model":
        return ServiceFailure("not_ready", f"the model is being loaded again: {error}")
    return error


def _is_loading(failure: AgentError) -> bool:
    return isinstance(failure, ServiceFailure) and failure.reason == "not_ready"


def _int32(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype="<i4").tobytes()
