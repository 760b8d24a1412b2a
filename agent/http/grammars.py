"""What an answer has to match, as llguidance reads it: from JSON schemas, regular expressions, grammars, choices and tools.

The worker holds answers to it (models/tasks/generation/constrain.py). Syntax: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

from agent.http.errors import invalid

MAX_CHARACTERS = 1 << 16
CALL_BEGINS, CALL_ENDS = "<tool_call>", "</tool_call>"
# Small models that may write spaces write nothing else; JSON as most programs print it.
SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def of_schema(schema: Mapping[str, Any] | bool, param: str) -> str:
    """JSON that the schema admits. Raises ApiError naming `param`."""
    text = _written(schema, param)
    return _checked(LLMatcher.grammar_from_json_schema(text, overrides=SPACING), param)


def of_regex(pattern: str, param: str) -> str:
    return _checked(LLMatcher.grammar_from_regex(pattern), param)


def of_lark(grammar: str, param: str) -> str:
    """A context-free grammar in llguidance's form of Lark; its first rule is called `start`."""
    return _checked(LLMatcher.grammar_from_lark(grammar), param)


def of_choice(choices: Sequence[str], param: str) -> str:
    return of_lark(f"start: {' | '.join(json.dumps(choice, ensure_ascii=False) for choice in choices)}", param)


def of_tools(tools: Mapping[str, Mapping[str, Any]], is_forced: bool, is_single: bool) -> str:
    """Calls as `<tool_call>\\n{"name": …, "arguments": …}\\n</tool_call>`; where none is forced, text around them.

    tools  name → JSON schema of the arguments
    """
    rules = []
    for number, (name, schema) in enumerate(tools.items()):
        spaced = {**(schema or {"type": "object"}), "x-guidance": SPACING}
        begin = json.dumps(f'\n{{"name": {json.dumps(name)}, "arguments": ')
        rules.append(f"call_{number}: {begin} arguments_{number} {json.dumps('}' + chr(10) + CALL_ENDS)}")
        rules.append(f"arguments_{number}: %json {_written(spaced, f'tools[{number}].function.parameters')}")
    calls = f"({' | '.join(f'call_{number}' for number in range(len(tools)))})"
    again = "" if is_single else "*"
    if is_forced:
        repeats = "" if is_single else f'("\\n" {json.dumps(CALL_BEGINS)} {calls})*'
        head = [f"start: {json.dumps(CALL_BEGINS)} {calls} {repeats}"]
    else:
        head = [
            "%llguidance {}",
            f"start: (opening {calls}){again or '?'} TEXT",
            f"opening[lazy]: TEXT {json.dumps(CALL_BEGINS)}",
            r"TEXT: /(.|\n)*/",
        ]
    return _checked(LLMatcher.grammar_from_lark("\n".join([*head, *rules])), "tools")


def _written(schema: Mapping[str, Any] | bool, param: str) -> str:
    text = json.dumps(schema)
    if len(text) > MAX_CHARACTERS:
        raise invalid(param, f"{param}: the schema has {len(text)} characters, at most {MAX_CHARACTERS} are taken")
    return text


def _checked(grammar: str, param: str) -> str:
    if len(grammar) > 2 * MAX_CHARACTERS:
        raise invalid(param, f"{param}: {len(grammar)} characters make too large a grammar; send less")
    problem = LLMatcher.validate_grammar(grammar)
    if problem:
        raise invalid(param, f"{param}: {problem.strip()[:300]}")
    return grammar
