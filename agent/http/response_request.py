"""The body of OpenAI's Responses API as far as it is text, and the same request as a chat, which is what answers it.

https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from agent.http.errors import ApiError, unsupported
from agent.http.requests import Body, ChatRequest, ModelName, Text
from agent.http.structure import MAX_TOOLS, FunctionName, Part, Schema

LOGPROBS = "message.output_text.logprobs"
# What a chat calls a thing → what it is called here, for faults that show when the chat is looked at.
PARAMS = {"messages": "input", "response_format": "text.format"}


class TextPart(Body):
    """`output_text` and `refusal` are what a client sends back of an earlier answer."""

    type: Literal["input_text", "output_text", "refusal"]
    text: Text = ""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, values: Any) -> Any:
        kind = values.get("type") if isinstance(values, dict) else None
        if isinstance(kind, str) and kind not in ("input_text", "output_text", "refusal"):
            raise unsupported("input", f"content parts of type {kind[:40]!r} are not supported; send parts of type 'input_text'")
        if not isinstance(values, dict):
            return values
        return {"type": kind, "text": values.get("text", values.get("refusal", ""))}


Content = Text | Annotated[list[TextPart], Field(max_length=256)]


class MessageItem(Part):
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(Part):
    call_id: str
    name: str
    arguments: str


class OutputItem(Part):
    call_id: str
    output: Content


class ReasoningItem(Part):
    """Sent back by clients; no template reads what was thought in earlier turns."""


def _kind(item: Any) -> str:
    kind = item.get("type") or "message" if isinstance(item, dict) else "message"
    if kind not in ("message", "function_call", "function_call_output", "reasoning"):
        raise unsupported("input", f"items of type {str(kind)[:40]!r} are not supported; send messages, function calls and their outputs")
    return str(kind)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Part):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_function(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(kind := values.get("type"), str) and kind != "function":
            raise unsupported("tools", f"tools of type {kind[:40]!r} are not supported; this node has functions only")
        return values


class NamedFunction(Part):
    type: Literal["function"]
    name: FunctionName


class Format(Part):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def of_chat(self) -> dict[str, Any]:
        schema = {"json_schema": {"name": self.name, "schema": self.schema_}} if self.type == "json_schema" else {}
        return {"type": self.type, **schema}


class TextForm(Part):
    format: Format | None = None


class Reasoning(Part):
    effort: str | None = None
    summary: str | None = None


class ResponseRequest(Body):
    model: ModelName
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=2048)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextForm | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "store": (False,), "previous_response_id": (), "conversation": (), "background": (False,), "prompt": (), "max_tool_calls": (),
        "truncation": ("disabled",), "context_management": ([],), "moderation": (), "image": (), "access_programs": (),
        "background_options": (),
    }  # fmt: skip

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    def as_chat(self) -> ChatRequest:
        """Raises ApiError."""
        fields: dict[str, Any] = {
            "model": self.model, "messages": self._messages(), "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature, "top_p": self.top_p, "stream": self.stream, "parallel_tool_calls": self.parallel_tool_calls,
        }  # fmt: skip
        if self.wants_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.tools:
            functions = [tool.model_dump(include={"name", "description", "parameters"}) for tool in self.tools]
            fields["tools"] = [{"type": "function", "function": function} for function in functions]
        if isinstance(self.tool_choice, NamedFunction):
            fields["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        else:
            fields["tool_choice"] = self.tool_choice
        if self.text and self.text.format:
            fields["response_format"] = self.text.format.of_chat()
        if self.reasoning and self.reasoning.effort == "none":
            fields["thinking"] = {"type": "disabled"}
        return ChatRequest.model_validate(fields)

    def _messages(self) -> list[dict[str, Any]]:
        """Calls belong to the turn of the assistant before them, and each item of output is a turn of its own."""
        told: list[dict[str, Any]] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*told, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, MessageItem):
                told.append({"role": item.role, "content": _text(item.content)})
            elif isinstance(item, CallItem):
                if not told or told[-1]["role"] != "assistant":
                    told.append({"role": "assistant", "content": ""})
                function = {"name": item.name, "arguments": item.arguments}
                told[-1].setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
            elif isinstance(item, OutputItem):
                told.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        return told


def in_its_words(error: ApiError) -> ApiError:
    """The fault of a chat, told to somebody who sent a response."""
    root = (error.param or "").partition("[")[0]
    if root not in PARAMS:
        return error
    name = PARAMS[root]
    param = name + (error.param or "")[len(root) :]
    message = error.message.replace(root, name)
    return ApiError(error.status_code, message, type_=error.type, param=param, code=error.code, headers=error.headers)


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
