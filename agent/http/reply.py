"""An answer's text as a client gets it: what the model thought, what it says, and which functions it wants called. Pure.

Thoughts stand between `<think>` and `</think>` at the beginning, calls between `<tool_call>` and `</tool_call>`: Hermes' form, which Qwen
and many others write (https://github.com/NousResearch/Hermes-Function-Calling).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from agent.http.grammars import CALL_BEGINS, CALL_ENDS

THINK_BEGINS, THINK_ENDS = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Call:
    """`arguments` is the text of a JSON object, as OpenAI has it."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of an answer: text of one kind, or one call."""

    kind: Literal["reasoning", "content"]
    text: str = ""
    call: Call | None = None


class Reply:
    """Reads one answer piece by piece. `tools`: names that may be called, none: calls are plain text.

    is_thinking  the prompt has opened the thoughts already
    """

    def __init__(self, tools: Collection[str] = (), is_thinking: bool = False) -> None:
        self._tools = tools
        self._state = "thinking" if is_thinking else "begin"  # then open, and call while within one
        self._held = ""
        self._is_fresh = True  # blanks between thoughts and words, or between words and calls, belong to neither
        self._calls = 0

    @property
    def has_calls(self) -> bool:
        return self._calls > 0

    def feed(self, text: str) -> list[Said]:
        self._held += text
        said: list[Said] = []
        while (step := self._step()) is not None:
            said += step
        return said

    def end(self) -> list[Said]:
        """What was held back. An unfinished call is told as the text that it is: nobody could carry it out."""
        held, self._held = self._held, ""
        if self._state == "thinking":
            return self._thoughts(held)
        if self._state == "call":
            return [Said("content", CALL_BEGINS + held)]
        return self._content(held)

    def _step(self) -> list[Said] | None:
        """Take what is certain of what is held; None: nothing more is."""
        if self._state == "begin":
            return self._begin()
        if self._state == "thinking":
            found = self._until(THINK_ENDS, "open")
            if found is None:
                return None
            said = self._thoughts(found.rstrip("\n") if self._state == "open" else found)
            self._is_fresh = self._is_fresh or self._state == "open"
            return said
        if self._state == "open":
            found = self._until(CALL_BEGINS, "call") if self._tools else self._all()
            return None if found is None else self._content(found)
        end = self._held.find(CALL_ENDS)
        if end < 0:
            return None
        inside, self._held = self._held[:end], self._held[end + len(CALL_ENDS) :]
        self._state, self._is_fresh = "open", True
        return self._call(inside)

    def _begin(self) -> list[Said] | None:
        begun = self._held.lstrip()
        if not begun or (THINK_BEGINS.startswith(begun) and begun != THINK_BEGINS):
            return None
        self._state = "open"
        self._is_fresh = False
        if begun.startswith(THINK_BEGINS):
            self._state, self._is_fresh = "thinking", True
            self._held = begun[len(THINK_BEGINS) :]
        return []

    def _until(self, mark: str, then: str) -> str | None:
        place = self._held.find(mark)
        if place >= 0:
            found, self._held, self._state = self._held[:place], self._held[place + len(mark) :], then
            return found
        keep = _overlap(self._held, mark)
        found = self._held[: len(self._held) - keep]
        if then == "open":
            found = found.rstrip("\n")  # those before the end of thoughts are no part of them
        self._held = self._held[len(found) :]
        return found or None

    def _all(self) -> str | None:
        found, self._held = self._held, ""
        return found or None

    def _thoughts(self, text: str) -> list[Said]:
        if self._is_fresh:
            text = text.lstrip("\n")
        self._is_fresh = self._is_fresh and not text
        return [Said("reasoning", text)] if text else []

    def _content(self, text: str) -> list[Said]:
        if self._is_fresh:
            text = text.lstrip()
        if not text or (self._calls and not text.strip()):
            return []
        self._is_fresh = False
        return [Said("content", text)]

    def _call(self, inside: str) -> list[Said]:
        try:
            fields = json.loads(inside)
            name, arguments = fields["name"], fields.get("arguments", fields.get("parameters", {}))
            is_call = name in self._tools and isinstance(arguments, dict)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            is_call = False
        if not is_call:
            return [Said("content", CALL_BEGINS + inside + CALL_ENDS)]
        call = Call(self._calls, f"call_{secrets.token_hex(12)}", name, json.dumps(arguments, ensure_ascii=False))
        self._calls += 1
        return [Said("content", call=call)]


def _overlap(text: str, mark: str) -> int:
    """How many letters at the end of `text` may be the beginning of `mark`."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-size:])), 0)
