"""Thoughts, words and calls out of one text, however it is cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.http.reply import Reply, Said

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'


def read(reply: Reply, pieces: list[str]) -> tuple[str, str, list[tuple[str, object]]]:
    said: list[Said] = [each for piece in pieces for each in reply.feed(piece)] + reply.end()
    thoughts, words = ("".join(each.text for each in said if each.kind == kind) for kind in ("reasoning", "content"))
    return thoughts, words, [(each.call.name, json.loads(each.call.arguments)) for each in said if each.call]


WEATHER = ("weather", {"city": "Łódź"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain words", ("", "plain words", [])),
        ("  indented", ("", "  indented", [])),
        ("<think>\nhm, 2 < 3\n</think>\n\nSo: 2", ("hm, 2 < 3", "So: 2", [])),
        (CALL, ("", "", [WEATHER])),
        (f"I look.\n{CALL}\n{CALL}", ("", "I look.\n", [WEATHER, WEATHER])),
        (f"<think>x</think>{CALL}", ("x", "", [WEATHER])),
        ("a < b <tool_ca", ("", "a < b <tool_ca", [])),
        ("<tool_call>\n{broken", ("", "<tool_call>\n{broken", [])),
        ("<tool_call>{}</tool_call>", ("", "<tool_call>{}</tool_call>", [])),
        (
            '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
            ("", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', []),
        ),
        ("<think>for ever", ("for ever", "", [])),
        ("<thin", ("", "<thin", [])),
    ],
)
def test_what_is_said(text: str, expected: tuple[str, str, list[tuple[str, object]]]) -> None:
    assert read(Reply(["weather"]), [text]) == expected
    assert read(Reply(["weather"]), list(text)) == expected, "letter by letter"


def test_a_prompt_may_have_opened_the_thoughts() -> None:
    assert read(Reply(is_thinking=True), ["hm</thi", "nk>\nyes"]) == ("hm", "yes", [])


def test_without_tools_a_call_is_text() -> None:
    assert read(Reply(), [CALL]) == ("", CALL, [])


@given(st.text(alphabet='<>/tolcahink_ {}\n"x', max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_no_cut_changes_anything(text: str, cuts: list[int]) -> None:
    bounds = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    pieces = [text[begin:end] for begin, end in itertools.pairwise(bounds)]
    assert read(Reply(["x"]), pieces) == read(Reply(["x"]), [text])
