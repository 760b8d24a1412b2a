"""What a request asks of an answer's form: tools, JSON, patterns; read strictly and turned into one grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agent.http import grammars
from agent.http.errors import invalid, unsupported

MAX_TOOLS = 64

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Schema = dict[str, Any]


class Part(BaseModel):
    """Fields beyond these say nothing about the answer."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, protected_namespaces=())


class Function(Part):
    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function

    def offered(self) -> dict[str, Any]:
        """As chat templates take it."""
        facts = {"name": self.function.name, "description": self.function.description or "", "parameters": self.function.parameters or {}}
        return {"type": "function", "function": facts}


class Named(Part):
    name: FunctionName


class NamedTool(Part):
    type: Literal["function"]
    function: Named


class Called(Part):
    name: str
    arguments: str


class ToolCall(Part):
    """A call that the model made earlier, as the client sends it back."""

    id: str
    type: Literal["function"] = "function"
    function: Called

    def told(self) -> dict[str, Any]:
        """Templates want the arguments as an object."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except ValueError as error:
            raise invalid("messages", f"the arguments of tool call {self.id[:80]!r} are not JSON: {error}") from error
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class JsonSchema(Part):
    """`strict` or not, the schema is kept to: nothing is gained by an answer that leaves it."""

    name: str
    schema_: Schema | None = Field(default=None, alias="schema")


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise invalid("response_format", "response_format of type json_schema needs json_schema.schema")
        return self

    def grammar(self) -> str:
        if self.type == "text":
            return ""
        schema = self.json_schema.schema_ if self.type == "json_schema" and self.json_schema else {"type": "object"}
        return grammars.of_schema(schema or {}, "response_format")


class StructuredOutputs(Part):
    """vLLM's extension: exactly one of these."""

    json_: Schema | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=256)] | None = None
    grammar: str | None = None

    def compiled(self) -> str:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            words = f"structured_outputs takes exactly one of json, regex, choice, grammar; it has {len(given)}"
            raise invalid("structured_outputs", words)
        if self.regex is not None:
            return grammars.of_regex(self.regex, "structured_outputs.regex")
        if self.choice is not None:
            return grammars.of_choice(self.choice, "structured_outputs.choice")
        if self.grammar is not None:
            return grammars.of_lark(self.grammar, "structured_outputs.grammar")
        return grammars.of_schema(_object(self.json_), "structured_outputs.json")


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def wanted_tools(tools: list[Tool] | None, choice: ToolChoice | None) -> Mapping[str, Schema]:
    """Name → schema of the arguments, of those that may be called. Raises ApiError."""
    names = [tool.function.name for tool in tools or ()]
    if len(set(names)) != len(names):
        raise invalid("tools", f"two tools have the same name; names are {', '.join(names)[:300]}")
    offered = {tool.function.name: tool.function.parameters or {} for tool in tools or ()}
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in offered:
            raise invalid("tool_choice", f"tool_choice names {name!r}, which is not among the tools")
        return {name: offered[name]}
    if choice == "required" and not offered:
        raise invalid("tool_choice", "tool_choice is 'required', and there are no tools")
    return {} if choice == "none" else offered


def grammar_of(
    tools: Mapping[str, Schema],
    choice: ToolChoice | None,
    is_single: bool,
    response_format: ResponseFormat | None,
    structured: StructuredOutputs | None,
) -> str:
    """One grammar for all that was asked; empty where nothing was. Raises ApiError for what contradicts itself."""
    formatted = response_format.grammar() if response_format else ""
    asked = [grammar for grammar in (formatted, structured.compiled() if structured else "") if grammar]
    if len(asked) > 1:
        raise invalid("structured_outputs", "response_format and structured_outputs exclude each other; send one")
    if not tools:
        return asked[0] if asked else ""
    if asked:
        raise unsupported("response_format", "this node keeps to a format or offers tools, not both; send tool_choice 'none' or no format")
    is_forced = choice == "required" or isinstance(choice, NamedTool)
    return grammars.of_tools(tools, is_forced, is_single or isinstance(choice, NamedTool))


def _object(value: Schema | str | None) -> Schema:
    if not isinstance(value, str):
        return value or {}
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise invalid("structured_outputs.json", f"structured_outputs.json is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise invalid("structured_outputs.json", "structured_outputs.json must be a JSON schema, an object")
    return parsed
