"""A response of OpenAI's Responses API in the making: its items, and the typed events that tell of each step. Pure.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from agent.http.errors import ApiError
from agent.http.reply import Call, Said

Event = dict[str, Any]
Status = Literal["completed", "incomplete"]
# item type, prefix of its id, type of its only part, events of its text
FORMS = {
    "reasoning": ("reasoning", "rs", "reasoning_text", "response.reasoning_text"),
    "content": ("message", "msg", "output_text", "response.output_text"),
}


def identifier(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"


class ResponseEvents:
    """`response`: the object without output, status in_progress. Each method gives the events of one step; `response` grows with them."""

    def __init__(self, response: dict[str, Any]) -> None:
        self.response: dict[str, Any] = {**response, "status": "in_progress", "output": []}
        self.thoughts = ""
        self._number = 0
        self._open: Literal["reasoning", "content"] | None = None
        self._text = ""
        self._logprobs: list[Any] = []

    @property
    def _items(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.response["output"]
        return items

    def begin(self) -> list[Event]:
        return [self._event(name, response=self._copy()) for name in ("response.created", "response.in_progress")]

    def say(self, said: Said, logprobs: Sequence[Any] = ()) -> list[Event]:
        if said.call is not None:
            return [*self._closed("completed"), *self._called(said.call)]
        events = [] if self._open == said.kind else [*self._closed("completed"), *self._opened(said.kind)]
        self._text += said.text
        self._logprobs += logprobs
        delta = {"logprobs": list(logprobs)} if said.kind == "content" else {}
        return [*events, self._event(f"{FORMS[said.kind][3]}.delta", **self._place(), content_index=0, delta=said.text, **delta)]

    def end(self, is_cut: bool, completed_at: int) -> list[Event]:
        """Close what is open; the last event, which `finished` gives, needs the usage. An answer that said nothing is an empty message."""
        events = [] if self._items else self._opened("content")
        status: Status = "incomplete" if is_cut else "completed"
        events += self._closed(status)
        self.response["status"] = status
        if is_cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = completed_at
        return events

    def finished(self, usage: dict[str, Any]) -> Event:
        self.response["usage"] = usage
        return self._event(f"response.{self.response['status']}", response=self._copy())

    def failed(self, error: ApiError) -> Event:
        code = "rate_limit_exceeded" if error.status_code == 429 else "server_error"
        self.response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return self._event("response.failed", response=self._copy())

    def _opened(self, kind: Literal["reasoning", "content"]) -> list[Event]:
        type_, prefix, _, _ = FORMS[kind]
        own: dict[str, Any] = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
        self._items.append({"id": identifier(prefix), "type": type_, "status": "in_progress", **own, "content": []})
        self._open, self._text, self._logprobs = kind, "", []
        return [
            self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(self._items[-1])),
            self._event("response.content_part.added", **self._place(), content_index=0, part=self._part()),
        ]

    def _closed(self, status: Status) -> Iterator[Event]:
        kind, self._open = self._open, None
        if kind is None:
            return
        part = self._part(kind)
        self._items[-1] |= {"content": [part], "status": status}
        self.thoughts += self._text if kind == "reasoning" else ""
        more = {"logprobs": part["logprobs"]} if kind == "content" else {}
        yield self._event(f"{FORMS[kind][3]}.done", **self._place(), content_index=0, text=self._text, **more)
        yield self._event("response.content_part.done", **self._place(), content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=dict(self._items[-1]))

    def _called(self, call: Call) -> list[Event]:
        item = {"id": identifier("fc"), "type": "function_call", "call_id": call.id, "name": call.name}
        self._items.append({**item, "arguments": call.arguments, "status": "completed"})
        index = len(self._items) - 1
        begun = {**item, "arguments": "", "status": "in_progress"}
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event("response.function_call_arguments.delta", **self._place(), delta=call.arguments),
            self._event("response.function_call_arguments.done", **self._place(), name=call.name, arguments=call.arguments),
            self._event("response.output_item.done", output_index=index, item=dict(self._items[-1])),
        ]

    def _part(self, kind: Literal["reasoning", "content"] | None = None) -> dict[str, Any]:
        kind = kind or self._open or "content"
        more = {"annotations": [], "logprobs": list(self._logprobs)} if kind == "content" else {}
        return {"type": FORMS[kind][2], "text": self._text, **more}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _copy(self) -> dict[str, Any]:
        return {**self.response, "output": list(self._items)}

    def _event(self, type_: str, **fields: Any) -> Event:
        event = {"type": type_, "sequence_number": self._number, **fields}
        self._number += 1
        return event
