"""The primary's past: of one size, however often and however long it is probed."""

from __future__ import annotations

from agent.gateway.probe import Probe
from coordinator.primary import STRETCH_S, STRETCHES, Past

GOOD, SLOW, BAD = Probe(True, 120.0, "HTTP 200"), Probe(True, 900.0, "HTTP 200"), Probe(False, 5.0, "HTTP 503" + "!" * 1000)


def test_probes_that_come_often_share_a_stretch() -> None:
    past = Past()
    for number, probe in enumerate((GOOD, SLOW, BAD, GOOD)):
        past.add(probe, is_down=probe is BAD, serving=(), now_s=100.0 + number)
    (stretch,) = past.stretches
    assert (stretch.probes, stretch.failed, stretch.latency_ms, stretch.is_down) == (4, 1, 900.0, False)
    assert stretch.reason.startswith("HTTP 503") and len(stretch.reason) == 200


def test_it_says_who_answered_and_names_few() -> None:
    past = Past()
    past.add(BAD, is_down=True, serving=[f"edge-{n}" for n in range(500)], now_s=0.0)
    assert (past.stretches[0].serving, past.stretches[0].names) == (500, ("edge-0", "edge-1", "edge-2"))
    assert past.stretches[0].latency_ms is None


def test_the_oldest_are_let_go() -> None:
    past = Past()
    for number in range(STRETCHES + 10):
        past.add(GOOD, is_down=False, serving=(), now_s=number * STRETCH_S)
    assert len(past.stretches) == STRETCHES
    assert (past.stretches[0].number, past.stretches[-1].number) == (11, STRETCHES + 10)
