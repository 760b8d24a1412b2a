"""Server-sent events of a completion, read while they pass: whole events out of pieces, what each says, what was said so far. Pure.

https://html.spec.whatwg.org/multipage/server-sent-events.html and OpenAI's chunks; DeepSeek adds comments while a request waits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agent.gateway.classify import FAILED_FINISHES

MAX_EVENT_BYTES = 4 << 20
END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r")
DATA_LINE = re.compile(rb"^data: ?(.*)$", re.MULTILINE)

Kind = Literal["comment", "token", "other", "done", "error", "malformed"]


class Splitter:
    """Pieces as they come from a connection to whole events, each with its empty line; what has no end yet is kept."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """Raises ValueError for an event over the limit: no completion has one, and it would fill the memory."""
        text, begin, events = self._rest + piece, 0, []
        for match in END_OF_EVENT.finditer(text):
            events.append(text[begin : match.end()])
            begin = match.end()
        self._rest = text[begin:]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of over {MAX_EVENT_BYTES} bytes")
        return events

    @property
    def has_rest(self) -> bool:
        return bool(self._rest.strip())


@dataclass
class Said:
    """What a stream has said: the text of its only choice, and the fields that its further chunks must repeat.

    tokens   that it cost, as its usage tells; 0: it has not told
    pieces   events with a token
    """

    head: dict[str, Any] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)
    has_role: bool = False
    has_token: bool = False
    has_usage: bool = False
    is_plain: bool = True  # one choice, with text only
    finish: str | None = None
    tokens: int = 0
    pieces: int = 0

    def read(self, event: bytes) -> tuple[Kind, str]:
        """What kind of event this is, and words for an error."""
        kind, words = self._read(event)
        self.pieces += kind == "token"
        return kind, words

    def _read(self, event: bytes) -> tuple[Kind, str]:
        lines = DATA_LINE.findall(event.replace(b"\r\n", b"\n"))
        if not lines:
            return ("comment" if event.lstrip()[:1] in (b":", b"") else "other"), ""
        data = b"\n".join(lines).strip()
        if data == b"[DONE]":
            return "done", ""
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            return "malformed", "an event that is no JSON"
        if not isinstance(chunk, dict):
            return "malformed", "an event that is no object"
        if chunk.get("error"):
            return "error", _words(chunk["error"])
        return self._typed(chunk) if isinstance(chunk.get("type"), str) and "sequence_number" in chunk else self._chunk(chunk)

    def _typed(self, item: Mapping[str, Any]) -> tuple[Kind, str]:
        """An event of the Responses API; its answers are not gone on with."""
        self.is_plain = False
        kind, response = item["type"], item.get("response")
        if kind in ("error", "response.failed"):
            error = response.get("error") if isinstance(response, dict) else item
            return "error", _words(error)
        if kind in ("response.completed", "response.incomplete"):
            self.has_token = True
            self.tokens = total_tokens(response)
            return "done", ""
        is_token = kind.endswith((".delta", ".done"))
        self.has_token = self.has_token or is_token
        return ("token" if is_token else "other"), ""

    def _chunk(self, chunk: Mapping[str, Any]) -> tuple[Kind, str]:
        if not self.head:
            self.head = {name: chunk[name] for name in ("id", "object", "created", "model", "system_fingerprint") if name in chunk}
        self.has_usage = self.has_usage or bool(chunk.get("usage"))
        self.tokens = total_tokens(chunk) or self.tokens
        choices = chunk.get("choices")
        if choices is None and "usage" not in chunk and "id" not in chunk:
            return "malformed", "an event without choices"
        is_token = False
        for choice in choices or ():
            if not isinstance(choice, dict):
                return "malformed", "a choice that is no object"
            is_token = self._choice(choice) or is_token
            if choice.get("finish_reason") in FAILED_FINISHES:
                self.finish = None
                return "error", str(choice["finish_reason"])
        self.has_token = self.has_token or is_token
        return ("token" if is_token else "other"), ""

    def _choice(self, choice: Mapping[str, Any]) -> bool:
        delta = choice.get("delta")
        delta = delta if isinstance(delta, dict) else {}
        self.has_role = self.has_role or bool(delta.get("role"))
        text = delta.get("content") or choice.get("text") or ""
        others = delta.get("tool_calls") or delta.get("function_call") or delta.get("refusal") or delta.get("audio")
        if others or choice.get("index", 0) != 0 or not isinstance(text, str):
            self.is_plain = False
        elif text:
            self.text.append(text)
        finish = choice.get("finish_reason")
        if finish:
            self.finish = str(finish)
        return bool(text or others or finish or delta.get("reasoning_content") or delta.get("reasoning"))


def total_tokens(answer: Any) -> int:
    """What an answer, a chunk or a response says that it cost; 0 where it does not say."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) and total > 0 else 0


def _words(error: Any) -> str:
    """A few letters of the primary's own words: they may quote a prompt, so no more than its type or code."""
    values = error if isinstance(error, dict) else {}
    return str(values.get("code") or values.get("type") or "an error event")[:60]
