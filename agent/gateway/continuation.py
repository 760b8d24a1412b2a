"""The rest of an answer that the primary began: the local model goes on from the text already sent, in the same stream of events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anyio.to_thread
from pydantic import ValidationError

from agent.errors import AgentError
from agent.gateway.classify import Failure
from agent.gateway.sse import Said
from agent.http.chat import delta_of, finish_of, turn_of
from agent.http.collaborators import Meant, Sampling, TextService, Usage
from agent.http.context import new_id, now_s
from agent.http.errors import ApiError, failed
from agent.http.generation import Caller, sampling_of, usage_of
from agent.http.reply import Reply
from agent.http.reply import Said as Piece
from agent.http.requests import ChatRequest, CompletionRequest
from agent.http.streams import closing, event

# What steers an answer that is under way no more, since plain text has begun: the local model must not be asked for it.
DROPPED = ("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "logit_bias", "stream_options", "prediction")


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
    if said.text and fields.get("structured_outputs"):
        return "its form can only be kept from the beginning"
    if said.text and isinstance(form, dict) and form.get("type") not in (None, "text"):
        return f"its form {str(form.get('type'))[:40]!r} can only be kept from the beginning"
    if fields.get("logprobs"):
        return "log probabilities of two models do not belong together"
    prompt = fields.get("prompt")
    if "messages" not in fields and not isinstance(prompt, str):
        return "it had several prompts"
    return ""


@dataclass(frozen=True)
class Rest:
    """What is to be generated. `tokens_said`: of it, by the primary; `reply`: reads an answer that begins anew, None where words go on;
    `continues`: it follows on the prompt's last word."""

    model: str
    prompt: Sequence[int]
    sampling: Sampling
    tokens_said: int
    reply: Reply | None = None
    continues: bool = True


class Continuation:
    """`meant`: what the client's name of the model stands for here. Words go on from those that were sent; where only thoughts were, the
    local model answers without thinking again, and where nothing was, as ever. Raises CannotContinue and AgentError."""

    def __init__(self, text: TextService, fields: Mapping[str, Any], said: Said, failure: Failure, meant: Meant, caller: Caller) -> None:
        self._text = text
        self._fields = fields
        self._said = said
        self._failure = failure
        self._meant = meant
        self._caller = caller
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
        rest = await anyio.to_thread.run_sync(self._prepare)
        yield f": hotspare: {self._failure.facts.words}; the answer goes on from the local model\n\n".encode()
        is_first, finish, usage = not (self._said.has_role or self._prefix), "length", Usage(len(rest.prompt), 0)
        skip = _trailing_space(self._prefix)
        if rest.sampling.max_tokens is None or rest.sampling.max_tokens > 0:
            async with closing(self._text.generate(rest.model, rest.prompt, rest.sampling, rest.continues)) as deltas:
                async for delta in deltas:
                    finish, usage = delta.finish or finish, delta.usage or usage
                    text, skip = _without(delta.text, skip)
                    for piece in _pieces(rest.reply, text, delta.finish is not None):
                        yield self._chunk(piece, None, is_first)
                        is_first = False
        yield self._chunk(None, finish if rest.reply is None else finish_of(finish, rest.reply), is_first)
        self._caller.note.tokens += usage.completion_tokens
        if self._wants_usage:
            read = usage.prompt_tokens - (rest.tokens_said if rest.reply is None else 0)
            total = Usage(read, usage.completion_tokens + rest.tokens_said, min(usage.cached_tokens, read))
            yield event({**self._head, "choices": [], "usage": usage_of([total], 1)})
        yield b"data: [DONE]\n\n"

    def _prepare(self) -> Rest:
        """In a thread, since encoding may take its time."""
        try:
            rest = self._plain() if not self._is_chat else self._words() if self._prefix else self._anew()
        except ValidationError as error:
            raise CannotContinue(f"the local model does not take the request: {error.errors()[0]['msg'][:200]}") from error
        except ApiError as error:
            raise CannotContinue(f"the local model does not take the request: {error.message}") from error
        limit = rest.sampling.max_tokens
        return rest if limit is None else replace(rest, sampling=replace(rest.sampling, max_tokens=max(0, limit - rest.tokens_said)))

    def _words(self) -> Rest:
        """The turn that was begun, by the client (`prefix`) or not, still open behind the words that were sent."""
        chat = ChatRequest.model_validate({name: value for name, value in self._fields.items() if name not in DROPPED})
        messages, begun = [message.plain() for message in chat.messages], ""
        if chat.messages[-1].prefix:
            *messages, last = messages
            begun = last["content"]
        model = self._meant.model
        prompt, tokens = self._text.continued_prompt(model, messages, begun + self._prefix)
        given = self._text.continued_prompt(model, messages, begun)[1] if begun else 0
        sampling = sampling_of(chat, chat.limit, self._caller, adapter=self._meant.adapter)
        return Rest(model, prompt, sampling, max(0, tokens - given))

    def _anew(self) -> Rest:
        """No word was sent, so tools and forms can be kept to; thoughts were, so the answer need not begin with them again."""
        quiet = {"thinking": {"type": "disabled"}} if self._said.pieces else {}
        chat = ChatRequest.model_validate({**self._fields, **quiet})
        turn = turn_of(self._text, chat, self._meant, self._caller)
        (job,) = turn.jobs
        return Rest(turn.model, job.prompt, job.sampling, self._said.pieces, turn.reply(), job.continues)

    def _plain(self) -> Rest:
        plain = CompletionRequest.model_validate({name: value for name, value in self._fields.items() if name not in DROPPED})
        model, asked = self._meant.model, str(plain.prompt)
        prompt = self._text.encode(model, (asked + self._prefix).rstrip(" \n") if self._prefix else asked)
        said = len(prompt) - len(self._text.encode(model, asked)) if self._prefix else 0
        sampling = sampling_of(plain, plain.max_tokens or 16, self._caller, adapter=self._meant.adapter)
        return Rest(model, prompt, sampling, max(0, said))

    def _make_head(self) -> dict[str, Any]:
        kind, name = ("chatcmpl", "chat.completion.chunk") if self._is_chat else ("cmpl", "text_completion")
        head = {"id": new_id(kind), "object": name, "created": now_s(), "model": str(self._fields.get("model", ""))}
        return {**head, **self._said.head}

    def _chunk(self, piece: Piece | None, finish: str | None, is_first: bool) -> bytes:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self._is_chat:
            role = {"role": "assistant", "content": ""} if is_first else {}
            choice["delta"] = {**role, **(delta_of(piece) if piece else {})}
        else:
            choice["text"] = piece.text if piece else ""
        tail: dict[str, Any] = {"usage": None} if self._wants_usage else {}
        if finish is not None:
            tail["hotspare"] = {"backend": "continued", "cause": self._failure.kind, "from_character": len(self._prefix)}
        return event({**self._head, "choices": [choice], **tail})


def _pieces(reply: Reply | None, text: str, is_last: bool) -> list[Piece]:
    if reply is None:
        return [Piece("content", text)] if text else []
    return [*reply.feed(text), *(reply.end() if is_last else ())]


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
