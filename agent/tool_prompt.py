"""Tools in a conversation, for models whose own template writes them in the form that is read back, and for all others. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# The words of Qwen's and Hermes' templates: models that know no other form have read these most often.
OFFER = """You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def written_out(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The conversation for a template that knows neither tools nor calls: the offer is its system's, results are its user's words."""
    told = [_plain(message) for message in messages]
    if tools:
        offer = OFFER.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        has_system = bool(told) and told[0]["role"] == "system"
        system = f"{told[0]['content']}\n\n{offer}" if has_system else offer
        told = [{"role": "system", "content": system}, *told[has_system:]]
    return _merged(told)


def _plain(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in message.get("tool_calls") or ()]
    words = [message["content"]] if message["content"] else []
    return {"role": message["role"], "content": "\n".join([*words, *calls])}


def _merged(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Several results in a row are one turn of the user: templates want turns to alternate."""
    merged: list[Mapping[str, Any]] = []
    for message in messages:
        is_result = message["content"].startswith("<tool_response>")
        if is_result and merged and merged[-1]["content"].startswith("<tool_response>") and merged[-1]["role"] == message["role"] == "user":
            merged[-1] = {"role": "user", "content": f"{merged[-1]['content']}\n{message['content']}"}
        else:
            merged.append(message)
    return merged
