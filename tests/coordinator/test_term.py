"""Who acts, by what stands on the presence topic."""

from __future__ import annotations

import pytest

from agent.protocol.messages import CoordinatorPresence
from agent.protocol.wire import wire_now
from coordinator.term import Verdict, judge


@pytest.mark.parametrize(
    ("name", "term", "online", "verdict"),
    [
        ("coord-b", 5, True, "ours"),
        ("coord-b", 5, False, "repair"),  # our own will, late
        ("coord-b", 4, True, "repair"),  # of our life before
        ("coord-b", 6, False, "rise"),  # our record is older than the fleet
        ("coord-a", 5, True, "repair"),  # the same term: the later name acts, on both sides
        ("coord-c", 5, True, "yield"),
        ("coord-a", 6, True, "yield"),
        ("coord-a", 4, True, "repair"),
        ("coord-a", 6, False, "rise"),  # it is gone: ours now
        ("coord-a", 5, False, "rise"),
        ("coord-a", 4, False, "repair"),
    ],
)
def test_the_higher_term_acts(name: str, term: int, online: bool, verdict: Verdict) -> None:
    assert judge("coord-b", 5, CoordinatorPresence(coordinator=name, term=term, online=online, ts=wire_now())) == verdict


def test_an_empty_or_unreadable_presence_is_repaired() -> None:
    assert judge("coord-b", 5, None) == "repair"
