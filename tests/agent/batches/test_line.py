"""How lines are read and written, and which answers are asked for again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.batches.line import CUSTOM_ID_MAX, Line, Reply, answered_line, number_of, pause_s, read_line, unanswered_line, was_lost
from agent.batches.record import Counts, LineError
from tests.agent.batches.rooms import request

CHAT = "/v1/chat/completions"


def test_a_line_as_it_must_be() -> None:
    line = read_line(7, json.dumps(request("a", "hi")).encode(), CHAT)
    assert isinstance(line, Line)
    assert (line.number, line.custom_id) == (7, "a")
    assert json.loads(line.body) == request("a", "hi")["body"]


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"\xff\xfe", "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        ({"custom_id": None}, "missing_required_parameter", "custom_id"),
        ({"custom_id": ""}, "missing_required_parameter", "custom_id"),
        ({"custom_id": "x" * (CUSTOM_ID_MAX + 1)}, "missing_required_parameter", "custom_id"),
        ({"custom_id": 7}, "missing_required_parameter", "custom_id"),
        ({"method": "GET"}, "invalid_method", "method"),
        ({"method": None}, "invalid_method", "method"),
        ({"url": "/v1/embeddings"}, "invalid_url", "url"),
        ({"url": ["x"] * 1000}, "invalid_url", "url"),
        ({"body": "text"}, "missing_required_parameter", "body"),
        ({"body": {"stream": True}}, "unsupported_parameter", "body.stream"),
    ],
)
def test_what_is_wrong_with_a_line_has_number_code_and_words(raw: Any, code: str, param: str | None) -> None:
    written = raw if isinstance(raw, bytes) else json.dumps({**request("a"), **raw}).encode()
    told = read_line(3, written, CHAT)
    assert isinstance(told, LineError)
    assert (told.line, told.code, told.param) == (3, code, param)
    assert 10 < len(told.message) < 200


@given(st.binary(max_size=200), st.integers(1, 10**9 - 1))
def test_any_bytes_are_a_line_or_an_error(raw: bytes, number: int) -> None:
    assert isinstance(read_line(number, raw, CHAT), (Line, LineError))


@given(st.text(max_size=20), st.integers(1, 10**9 - 1), st.sampled_from([200, 400, 503]))
def test_what_is_written_says_which_line_it_answers(custom_id: str, number: int, status: int) -> None:
    line = Line(number, custom_id, b"{}")
    written, counts = answered_line("batch_0a1b", line, Reply(status, b'\n{"x": "a\\nb"}', "req_1"))
    assert number_of(written) == number
    assert written.count(b"\n") == 1
    assert counts == (Counts(completed=1) if status == 200 else Counts(failed=1))
    assert json.loads(written)["custom_id"] == custom_id
    assert number_of(unanswered_line("batch_0a1b", line, "batch_expired")) == number
    for cut in range(len(written)):
        assert number_of(written[:cut]) is None


def test_usage_in_the_words_of_either_api() -> None:
    chat = {"usage": {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}}
    items = {
        "usage": {
            "input_tokens": 5,
            "output_tokens": 3,
            "input_tokens_details": {"cached_tokens": 2},
            "output_tokens_details": {"reasoning_tokens": 1},
        }
    }
    for body, reasoning in ((chat, 0), (items, 1)):
        _, counts = answered_line("batch_0", Line(1, "a", b"{}"), Reply(200, json.dumps(body).encode(), "req_1"))
        assert counts == Counts(completed=1, input_tokens=5, output_tokens=3, cached_tokens=2, reasoning_tokens=reasoning)


def reply(status: int, code: str, retry_s: float = 0.0) -> Reply:
    return Reply(status, json.dumps({"error": {"code": code}}).encode(), "req_1", retry_s)


def test_which_answers_are_asked_for_again() -> None:
    assert pause_s(Reply(200, b"{}", "r"), 1) is None
    assert pause_s(reply(400, "invalid_value"), 1) is None
    assert pause_s(reply(429, "busy", 7), 1) == 7
    assert pause_s(reply(503, "not_ready"), 10_000) == 60
    for lost in (reply(503, "worker_lost"), reply(500, "internal_error")):
        assert [pause_s(lost, attempts) is None for attempts in (1, 2, 3)] == [False, False, True]
        assert was_lost(lost)
    assert not was_lost(reply(503, "busy"))
    assert pause_s(reply(503, "worker_lost"), 0) is not None, "it failed while the node was ending"
    assert pause_s(Reply(503, b"no json", "r"), 1) is None
