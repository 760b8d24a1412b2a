from __future__ import annotations

from typing import Any

from agent.tool_prompt import written_out

TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def test_the_offer_joins_the_system_words_and_results_are_the_users() -> None:
    said: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "one", "tool_call_id": "1"},
        {"role": "tool", "content": "two", "tool_call_id": "2"},
    ]
    system, user, assistant, results = written_out(said, [TOOL])
    assert system["content"].startswith("Be brief.\n\nYou may call") and '"name": "f"' in system["content"]
    assert user == {"role": "user", "content": "go"}
    assert assistant["content"].count('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>') == 2
    assert results == {"role": "user", "content": "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"}


def test_without_a_system_one_is_made_and_without_tools_none() -> None:
    assert [each["role"] for each in written_out([{"role": "user", "content": "go"}], [TOOL])] == ["system", "user"]
    assert written_out([{"role": "user", "content": "go"}], []) == [{"role": "user", "content": "go"}]
