from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.stop_matcher import StopMatcher


def feed_all(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher, given_out = StopMatcher(stops), ""
    for piece in pieces:
        safe, is_stopped = matcher.feed(piece)
        given_out += safe
        if is_stopped:
            return given_out, True
    return given_out + matcher.flush(), False


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
def test_pieces_stop_where_the_first_stop_string_is_complete(text: str, stops: list[str], cuts: list[int]) -> None:
    pieces, start = [], 0
    for cut in cuts:
        pieces.append(text[start : start + cut])
        start += cut
    given_out, is_stopped = feed_all(stops, pieces)
    assert is_stopped == any(stop in text for stop in stops)
    assert text.startswith(given_out)
    if is_stopped:
        assert not any(stop in given_out for stop in stops)
        assert any(text[len(given_out) :].startswith(stop) for stop in stops)
    else:
        assert given_out == text


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\nUser:", "###"])
    assert matcher.feed("Hello\n") == ("Hello", False)
    assert matcher.feed("Us") == ("", False)
    assert matcher.feed("ual") == ("\nUsual", False)
    assert matcher.feed(" ##") == (" ", False)
    assert matcher.feed("# more") == ("", True)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])
