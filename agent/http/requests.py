"""Bodies of OpenAI's API as far as a backup node serves them. What it cannot honour is refused by name, never dropped in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from agent.http.errors import ApiError, invalid, unsupported
from agent.http.structure import (
    MAX_TOOLS,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    Tool,
    ToolCall,
    ToolChoice,
    grammar_of,
    wanted_tools,
)

MAX_CHOICES = 4
MAX_PROMPTS = 32

ModelName = Annotated[str, Field(min_length=1, max_length=200)]
TokenText = Annotated[str, Field(pattern=r"^\d{1,9}$")]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


def _encodable(text: str) -> str:
    """JSON may spell half of a surrogate pair (D83D alone), which no encoding of text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(None, f"character {error.start} of a text is half of a surrogate pair; send valid Unicode") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]

# Accepted without effect: who asks, where it is billed, and how long to think, which a model without thinking must not trip over.
WITHOUT_EFFECT = frozenset({
    "user", "user_id", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "reasoning_effort", "verbosity", "prompt_cache_options",
})  # fmt: skip


class Body(BaseModel):
    """Unknown fields are let in only so that the refusal can name them."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="after")
    def _nothing_unknown(self) -> Body:
        for name, value in (self.model_extra or {}).items():
            if value is None or value in self.neutral.get(name, ()):
                continue
            if name in self.neutral:
                raise unsupported(name, "this node does not support it; leave it out, or ask the primary")
            if name in WITHOUT_EFFECT:
                continue
            raise ApiError(400, f"unrecognised request argument: {name[:100]}", param=name[:100], code="unknown_parameter")
        return self


class SamplingBody(Body):
    """What chat, completions and an item of a batch share."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenText, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    structured_outputs: StructuredOutputs | None = None

    def grammar(self) -> str:
        """What the answer must match; empty: anything. Raises ApiError. May take long: for a thread."""
        return grammar_of({}, None, True, None, self.structured_outputs)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        return tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    include_usage: bool | None = None


class Part(Body):
    type: str
    text: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(kind := values.get("type"), str) and kind != "text":
            raise unsupported("messages", f"content parts of type {kind[:40]!r} are not supported; send parts of type 'text'")
        return values


class ChatMessage(Body):
    """Fields that a client copies from an earlier answer (refusal, annotations, DeepSeek's reasoning) have no effect."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    prefix: bool | None = None

    neutral = {"function_call": (), "audio": ()}

    @model_validator(mode="before")
    @classmethod
    def _without_echo(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {key: item for key, item in values.items() if key not in ("name", "refusal", "annotations", "reasoning_content")}
        return values

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: role, content, and of the turns that concern tools what belongs to them."""
        told: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text()}
        if self.tool_calls:
            told["tool_calls"] = [call.told() for call in self.tool_calls]
        if self.tool_call_id is not None:
            told["tool_call_id"] = self.tool_call_id
        return told

    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text or "" for part in self.content)


class Thinking(BaseModel):
    """DeepSeek's switch, for models whose template has one."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: Literal["enabled", "disabled"]


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]


class ChatRequest(SamplingBody):
    model: ModelName
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    thinking: Thinking | None = None

    neutral = {
        "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "prediction": (),
        "web_search_options": (), "min_p": (0,), "repetition_penalty": (1,),
    }  # fmt: skip

    def wanted_tools(self) -> Mapping[str, Schema]:
        """Name → schema of the arguments, of those that may be called. Raises ApiError."""
        return wanted_tools(self.tools, self.tool_choice)

    def grammar(self) -> str:
        is_single = self.parallel_tool_calls is False
        return grammar_of(self.wanted_tools(), self.tool_choice, is_single, self.response_format, self.structured_outputs)

    @model_validator(mode="after")
    def _prefix_is_last(self) -> ChatRequest:
        if any(message.prefix for message in self.messages[:-1]) or (self.messages[-1].prefix and self.messages[-1].role != "assistant"):
            raise invalid("messages", "prefix is for the last message, and only if it is the assistant's")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int:
        """How many alternatives beside each token; -1: no logprobs at all."""
        if not self.logprobs:
            if self.top_logprobs:
                raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
            return -1
        return self.top_logprobs or 0


class CompletionRequest(SamplingBody):
    model: ModelName
    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    neutral = {"suffix": ("",), "echo": (False,), "best_of": (1,)}

    @property
    def prompts(self) -> list[str | list[int]]:
        prompts = several(self.prompt)
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise invalid("prompt", f"prompt: {len(prompts)} prompts; send 1 to {MAX_PROMPTS}, or use /v1/batch")
        if not all(prompts):
            raise invalid("prompt", "prompt: an empty prompt has nothing to continue")
        return prompts


class EmbeddingRequest(Body):
    model: ModelName
    input: Text | Annotated[list[Text], Field(max_length=2048)] | list[TokenId] | Annotated[list[list[TokenId]], Field(max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        inputs = several(self.input)
        if not inputs or not all(inputs):
            raise invalid("input", "input: an empty input has no embedding; send at least one character or token")
        return inputs


class ClassifyRequest(Body):
    model: ModelName | None = None
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=256)]
    top: Annotated[int, Field(ge=1, le=100)] | None = None


class BatchItem(SamplingBody):
    """One request of a merged call: either a prompt to continue or a conversation."""

    model: ModelName | None = None
    prompt: Text | list[TokenId] | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> BatchItem:
        if bool(self.prompt) == bool(self.messages):
            raise invalid("requests", "each item of requests needs either a non-empty prompt or messages, not both")
        return self


class BatchRequest(Body):
    """Items are parsed one by one, so that a bad one fails alone."""

    model: ModelName | None = None
    requests: Annotated[list[Any], Field(min_length=1, max_length=64)]


class DetectRequest(Body):
    """`image`: base64 or a data URL."""

    image: str
    model: ModelName | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    annotate: bool | None = None


class SwitchRequest(Body):
    on: bool


def several(value: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One or many texts or token lists, as a list."""
    if isinstance(value, str):
        return [value]
    if value and isinstance(value[0], int):
        return [[token for token in value if isinstance(token, int)]]
    return [item for item in value if not isinstance(item, int)]
