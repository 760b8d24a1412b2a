"""An answer as it is kept: whole or as events, and given again in either form, with its usage saying that it cost nothing. Pure."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.gateway.sse import END_OF_EVENT, Said
from agent.http.streams import event

DONE = b"data: [DONE]\n\n"
WORDS_A_CHUNK = 8
BEYOND_TEXT = ("tool_calls", "function_call", "refusal", "audio")


@dataclass(frozen=True, slots=True)
class Kept:
    """`made_s`: seconds since 1970. `body`: JSON, or events with their empty lines."""

    is_stream: bool
    made_s: float
    body: bytes

    def packed(self) -> bytes:
        head = {"stream": self.is_stream, "made_s": self.made_s, "check": zlib.crc32(self.body)}
        return json.dumps(head).encode() + b"\n" + self.body

    @classmethod
    def unpacked(cls, data: bytes) -> Kept | None:
        """None for bytes that are none of ours: another version wrote them, or a disk broke them."""
        head, _, body = data.partition(b"\n")
        try:
            fields = json.loads(head)
            is_whole = fields["check"] == zlib.crc32(body)
            return cls(bool(fields["stream"]), float(fields["made_s"]), body) if body and is_whole else None
        except (ValueError, KeyError, TypeError):
            return None


def kept_of(body: bytes, is_stream: bool, made_s: float) -> Kept | None:
    """What to keep of an answer that came with status 200; None where it is not whole or says that it failed."""
    if is_stream:
        events, said = split(body), Said()
        kinds = [said.read(item)[0] for item in events]
        if not kinds or kinds[-1] != "done" or "error" in kinds or "malformed" in kinds or not said.has_token:
            return None
        items = [_with_usage(item) for item, kind in zip(events, kinds, strict=True) if kind != "comment"]
        return Kept(True, made_s, b"".join(items))
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or answer.get("error") or not (answer.get("choices") or answer.get("data")):
        return None
    _mark(answer)
    return Kept(False, made_s, _dumped(answer))


def given(kept: Kept, wants_stream: bool, wants_usage: bool) -> bytes | None:
    """The body for a client that wants this form; None where the kept form cannot be turned into it."""
    if not wants_stream:
        return _whole(kept.body) if kept.is_stream else kept.body
    return _events(kept.body, wants_usage) if not kept.is_stream else _fitting(kept.body, wants_usage)


def split(body: bytes) -> list[bytes]:
    events, begin = [], 0
    for match in END_OF_EVENT.finditer(body):
        events.append(body[begin : match.end()])
        begin = match.end()
    return events


def _fitting(body: bytes, wants_usage: bool) -> bytes | None:
    events = split(body)
    closing = [item for item in events[-3:] if _is_usage(item)]
    if wants_usage:
        return body if closing else None
    return b"".join(item for item in events if item not in closing) if closing else body


def _is_usage(item: bytes) -> bool:
    chunk = _chunk(item)
    return bool(chunk) and not chunk.get("choices") and bool(chunk.get("usage"))


def _whole(body: bytes) -> bytes | None:
    """A whole answer out of events: only of plain text with its usage, for nothing may be made up."""
    chunks = [chunk for item in split(body) if (chunk := _chunk(item))]
    usage = next((chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage")), None)
    head = chunks[0] if chunks else {}
    is_chat = head.get("object") == "chat.completion.chunk"
    text, reasoning, finish = "", "", None
    for chunk in chunks:
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            if choice.get("logprobs") or set(delta) - {"role", "content", "reasoning_content", "refusal"} or delta.get("refusal"):
                return None
            text += delta.get("content") or choice.get("text") or ""
            reasoning += delta.get("reasoning_content") or ""
            finish = choice.get("finish_reason") or finish
    if usage is None or finish is None:
        return None
    choice = {"index": 0, "finish_reason": finish, "logprobs": None}
    if is_chat:
        thought = {"reasoning_content": reasoning} if reasoning else {}
        choice["message"] = {"role": "assistant", "content": text, **thought, "refusal": None}
    else:
        choice["text"] = text
    names = ("id", "created", "model", "system_fingerprint")
    kind = "chat.completion" if is_chat else "text_completion"
    return _dumped({**{name: head[name] for name in names if name in head}, "object": kind, "choices": [choice], "usage": usage})


def _events(body: bytes, wants_usage: bool) -> bytes | None:
    """Events out of a whole answer, some words each; only of plain text."""
    answer = json.loads(body)
    choices = answer.get("choices") or [{}]
    choice, message = choices[0], choices[0].get("message") or {}
    is_chat = "message" in choice
    if len(choices) != 1 or choice.get("logprobs") or any(message.get(name) for name in BEYOND_TEXT):
        return None
    if wants_usage and not answer.get("usage"):
        return None
    names = ("id", "created", "model", "system_fingerprint")
    head = {**{name: answer[name] for name in names if name in answer}, "object": "chat.completion.chunk" if is_chat else "text_completion"}
    tail: dict[str, Any] = {"usage": None} if wants_usage else {}

    def chunk(delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        body = {"delta": delta} if is_chat else {"text": delta.get("content", "")}
        return event({**head, "choices": [{"index": 0, **body, "logprobs": None, "finish_reason": finish}], **tail})

    text = (message.get("content") if is_chat else choice.get("text")) or ""
    items = [chunk({"role": "assistant", "content": ""})] if is_chat else []
    if message.get("reasoning_content"):
        items.append(chunk({"reasoning_content": message["reasoning_content"]}))
    items += [chunk({"content": piece}) for piece in _pieces(text)]
    items.append(chunk({}, choice.get("finish_reason") or "stop"))
    if wants_usage:
        items.append(event({**head, "choices": [], "usage": answer["usage"]}))
    return b"".join([*items, DONE])


def _pieces(text: str) -> list[str]:
    words = text.split(" ")
    groups = [" ".join(words[begin : begin + WORDS_A_CHUNK]) for begin in range(0, len(words), WORDS_A_CHUNK)]
    return [piece if index == 0 else f" {piece}" for index, piece in enumerate(groups)] if text else []


def _chunk(item: bytes) -> dict[str, Any]:
    _, _, data = item.partition(b"data:")
    try:
        chunk = json.loads(data)
    except ValueError:
        return {}
    return chunk if isinstance(chunk, dict) else {}


def _with_usage(item: bytes) -> bytes:
    chunk = _chunk(item) if b'"usage"' in item else {}
    if not chunk.get("usage"):
        return item
    _mark(chunk)
    return event(chunk)


def _mark(answer: dict[str, Any]) -> None:
    """DeepSeek's and OpenAI's way to say that the prompt was not computed again."""
    usage = answer.get("usage")
    if not isinstance(usage, dict) or not isinstance(usage.get("prompt_tokens"), int):
        return
    read, details = usage["prompt_tokens"], usage.get("prompt_tokens_details")
    details = {**(details if isinstance(details, dict) else {}), "cached_tokens": read}
    answer["usage"] = {**usage, "prompt_cache_hit_tokens": read, "prompt_cache_miss_tokens": 0, "prompt_tokens_details": details}


def _dumped(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
