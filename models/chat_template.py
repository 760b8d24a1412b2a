"""Conversations to prompts: a model's own Jinja template, bounded. The one home of `jinja2` outside converters."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any, List, Mapping, NoReturn, Optional, Sequence

from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.tokenizer import Tokenizer, read_bounded

MAX_TEMPLATE_BYTES = 256 << 10
MAX_RENDERED_CHARACTERS = 4 << 20
MAX_RENDER_S = 2.0


class ChatTemplateError(ValueError):
    """A chat template is not valid, or a conversation does not suit it; the message says why."""


class ChatTemplate:
    """A model's Jinja chat template, in the environment that transformers gives it, with bounds on time and length.

    https://huggingface.co/docs/transformers/chat_templating
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        if len(source.encode()) > MAX_TEMPLATE_BYTES:
            raise ChatTemplateError(f"the chat template has {len(source.encode())} bytes, at most {MAX_TEMPLATE_BYTES} are allowed")
        self._marks = {"bos_token": bos_token, "eos_token": eos_token}
        self._source = source
        self._environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self._environment.filters["tojson"] = _to_json
        self._environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            self._template = self._environment.from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(f"the chat template is not valid: {error}") from error

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer) -> Optional[ChatTemplate]:
        """The template `chat_template.jinja` of a converted model; None if the model has none."""
        path = folder / "chat_template.jinja"
        if not path.is_file():
            return None
        facts = tokenizer.facts
        source = read_bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace")
        return cls(source, tokenizer.mark(facts.bos_id if facts else None), tokenizer.mark(facts.eos_id if facts else None))

    @property
    def writes_calls(self) -> bool:
        """Whether it tells a model of tools, and in the form `<tool_call>{"name": …, "arguments": …}</tool_call>`."""
        return "<tool_call>" in self._source and "tools" in meta.find_undeclared_variables(self._environment.parse(self._source))

    def opens_thoughts(self, **variables: Any) -> bool:
        """Whether prompts end with `<think>`, so that answers begin within the thoughts."""
        return "<think>" in self._source and self.render([{"role": "user", "content": "?"}], **variables).rstrip().endswith("<think>")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Optional[Sequence[Mapping[str, Any]]] = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation. Raises ChatTemplateError when the template refuses it or goes over a bound."""
        values = {**self._marks, **variables, "messages": messages, "tools": tools, "documents": None}
        self._environment.deadline = time.monotonic() + MAX_RENDER_S
        pieces: List[str] = []
        length = 0
        try:
            for piece in self._template.generate(add_generation_prompt=add_generation_prompt, **values):
                length += len(piece)
                self._environment.check_bounds(length)
                pieces.append(piece)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            raise ChatTemplateError(f"the chat template does not take this conversation: {error}") from error
        return "".join(pieces)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox bounds `range`; this also bounds time, at every call and piece of output, and what repetition makes."""

    deadline = float("inf")
    intercepted_binops = frozenset(["*", "**"])

    def check_bounds(self, length: int = 0) -> None:
        if length > MAX_RENDERED_CHARACTERS:
            raise SecurityError(f"over {MAX_RENDERED_CHARACTERS} characters")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"not done in {MAX_RENDER_S} seconds")

    def call(self, *arguments: Any, **values: Any) -> Any:
        self.check_bounds()
        return super().call(*arguments, **values)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "**" and not (numbers and abs(left) <= 1 << 20 and abs(right) <= 8):
            raise SecurityError("a power this large")
        if operator == "*" and not numbers:
            count, repeated = (left, right) if isinstance(left, int) else (right, left)
            self.check_bounds(count * len(repeated) if isinstance(count, int) else 0)
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; for inference it only holds them."""

    tags = {"generation"}  # noqa: RUF012  an attribute that Jinja defines so

    def parse(self, parser: Parser) -> List[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Optional[int] = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model has seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().astimezone().strftime(layout)
