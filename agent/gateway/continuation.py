"""The rest of an answer that the primary began: the local model goes on from the text already sent, in the same stream of events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import anyio.to_thread
from pydantic import ValidationError

from agent.errors import AgentError
from agent.gateway.classify import Failure
from agent.gateway.sse import Said
from agent.http.collaborators import Sampling, TextDelta, Usage
from agent.http.context import new_id, now_s
from agent.http.errors import ApiError, failed
from agent.http.generation import sampling_of, usage_of
from agent.http.requests import ChatRequest, CompletionRequest
from agent.http.streams import closing, event

# What steers an answer that is under way no more, since plain text has begun: the local model must not be asked for it.
DROPPED = ("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "logit_bias", "stream_options", "prediction")


class Continues(Protocol):
    """A text service that can go on from a half answer."""

    def continued_prompt(self, model: str, messages: Sequence[Mapping[str, Any]], said: str) -> tuple[list[int], int]: ...

    def encode(self, model: str, text: str) -> list[int]: ...

    def generate(
        self, model: str, prompt_tokens: Sequence[int], sampling: Sampling, continues: bool = False
    ) -> AsyncIterator[TextDelta]: ...


class CannotContinue(Exception):
    """The answer cannot be gone on with; the message says why, for the client."""


def why_not(fields: Mapping[str, Any], said: Said) -> str:
    """Why the rest of this answer cannot come from a local model; empty: it can."""
    if "input" in fields:
        return "responses in items are not gone on with"
    if not said.is_plain:
        return "it was calling a tool, or had several choices"
    if (fields.get("n") or 1) != 1:
        return "it had several choices"
    form = fields.get("response_format")
    if isinstance(form, dict) and form.get("type") not in (None, "text"):
        return f"its form {str(form.get('type'))[:40]!r} can only be kept from the beginning"
    if fields.get("logprobs"):
        return "log probabilities of two models do not belong together"
    prompt = fields.get("prompt")
    if "messages" not in fields and not isinstance(prompt, str):
        return "it had several prompts"
    return ""


class Continuation:
    """`model`: the client's name for it. `words` says in a comment who goes on and why. Raises CannotContinue and AgentError."""

    def __init__(self, text: Continues, fields: Mapping[str, Any], said: Said, failure: Failure) -> None:
        self._text = text
        self._fields = fields
        self._said = said
        self._failure = failure
        self._is_chat = "messages" in fields
        self._prefix = "".join(said.text)
        options = fields.get("stream_options")
        self._wants_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        self._head = self._make_head()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """A comment, chunks, the reason of the end, usage where it was asked for, [DONE]."""
        if self._said.finish is not None:  # only its end is missing
            if self._wants_usage and not self._said.has_usage:
                yield event({**self._head, "choices": [], "usage": usage_of([Usage(0, 0)], 1)})
            yield b"data: [DONE]\n\n"
            return
        prompt, tokens_said, sampling = await anyio.to_thread.run_sync(self._prepare)
        yield f": hotspare: {self._failure.facts.words}; the answer goes on from the local model\n\n".encode()
        is_first, finish, usage = not (self._said.has_role or self._prefix), "length", Usage(len(prompt), 0)
        skip = _trailing_space(self._prefix)
        if sampling.max_tokens is None or sampling.max_tokens > 0:
            async with closing(self._text.generate(self._model, prompt, sampling, continues=True)) as deltas:
                async for delta in deltas:
                    finish, usage = delta.finish or finish, delta.usage or usage
                    text, skip = _without(delta.text, skip)
                    if text:
                        yield self._chunk(text, None, is_first)
                        is_first = False
        yield self._chunk("", finish, is_first)
        if self._wants_usage:
            read = usage.prompt_tokens - tokens_said
            total = Usage(read, usage.completion_tokens + tokens_said, min(usage.cached_tokens, read))
            yield event({**self._head, "choices": [], "usage": usage_of([total], 1)})
        yield b"data: [DONE]\n\n"

    def _prepare(self) -> tuple[list[int], int, Sampling]:
        """Prompt with what was said, how many tokens of it were said, and how to go on; in a thread, since encoding may take its time."""
        fields = {name: value for name, value in self._fields.items() if name not in DROPPED}
        try:
            if self._is_chat:
                chat = ChatRequest.model_validate(fields)
                messages = [message.plain() for message in chat.messages]
                prompt, said = self._text.continued_prompt(chat.model, messages, self._prefix)
                sampling = sampling_of(chat, chat.limit)
            else:
                plain = CompletionRequest.model_validate(fields)
                asked = str(plain.prompt)
                prompt = self._text.encode(plain.model, (asked + self._prefix).rstrip(" \n") if self._prefix else asked)
                said = len(prompt) - len(self._text.encode(plain.model, asked)) if self._prefix else 0
                sampling = sampling_of(plain, plain.max_tokens or 16)
        except ValidationError as error:
            raise CannotContinue(f"the local model does not take the request: {error.errors()[0]['msg'][:200]}") from error
        except ApiError as error:
            raise CannotContinue(f"the local model does not take the request: {error.message}") from error
        said = max(0, said)
        if sampling.max_tokens is not None:
            sampling = replace(sampling, max_tokens=max(0, sampling.max_tokens - said))
        return prompt, said, sampling

    @property
    def _model(self) -> str:
        return str(self._fields.get("model", ""))

    def _make_head(self) -> dict[str, Any]:
        kind, name = ("chatcmpl", "chat.completion.chunk") if self._is_chat else ("cmpl", "text_completion")
        return {"id": new_id(kind), "object": name, "created": now_s(), "model": self._model, **self._said.head}

    def _chunk(self, text: str, finish: str | None, is_first: bool) -> bytes:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self._is_chat:
            role = {"role": "assistant"} if is_first else {}
            choice["delta"] = {**role, **({"content": text} if text or is_first else {})}
        else:
            choice["text"] = text
        tail: dict[str, Any] = {"usage": None} if self._wants_usage else {}
        if finish is not None:
            tail["hotspare"] = {"backend": "continued", "cause": self._failure.kind, "from_character": len(self._prefix)}
        return event({**self._head, "choices": [choice], **tail})


def interrupted(failure: Failure, why: str) -> ApiError:
    """The error event of a stream that nobody goes on with."""
    return ApiError(
        502, f"the primary failed in the middle of the answer: {failure.words}; {why}", type_="server_error", code="stream_interrupted"
    )  # fmt: skip


def as_api_error(error: Exception, failure: Failure) -> ApiError:
    """What a client is told when the local model could not go on."""
    if isinstance(error, AgentError):
        return interrupted(failure, f"the local model could not go on with it: {failed(error).message}")
    return interrupted(failure, f"the rest was not made: {error}")


def _trailing_space(text: str) -> str:
    """The spaces at the end, which stay out of the prompt: a token for a space alone is not what models continue from."""
    return text[len(text.rstrip(" \n")) :]


def _without(text: str, skip: str) -> tuple[str, str]:
    """`text` without the spaces that were sent already, and which of them are still to come."""
    while skip and text and text[0] == skip[0]:
        text, skip = text[1:], skip[1:]
    return text, ("" if text else skip)
