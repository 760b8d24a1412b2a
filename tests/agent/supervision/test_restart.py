from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.supervision.restart import History, Quarantine, Restart, RestartPolicy, after_crash

POLICY = RestartPolicy(first_s=0.5, cap_s=30, crashes=5, window_s=300, stable_s=60, quarantine_s=900)


def longest() -> float:
    return 1.0


def test_delays_double_up_to_the_cap() -> None:
    history, delays, now_s = History(), [], 1000.0
    for _ in range(12):
        now_s += 301  # each crash alone in its window
        history, decision = after_crash(POLICY, history, now_s, 0.0, longest)
        assert isinstance(decision, Restart)
        delays.append(decision.at_s - now_s)
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert delays[-1] == 30.0


def test_a_stable_life_begins_anew() -> None:
    history = History(in_a_row=9)
    history, decision = after_crash(POLICY, history, 1000.0, 60.0, longest)
    assert decision == Restart(1000.5)
    assert history.in_a_row == 1


def test_quarantine_when_the_window_is_full_and_a_clean_sheet_after_it() -> None:
    history = History((0.0, 100.0, 200.0, 299.0), 4)
    assert after_crash(POLICY, history, 299.5, 0.0, longest) == (History(), Quarantine(1199.5))
    assert isinstance(after_crash(POLICY, history, 300.5, 0.0, longest)[1], Restart)


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e3), st.floats(0, 0.999)), max_size=40))
def test_it_never_waits_longer_than_it_says_nor_remembers_without_end(crashes: list[tuple[float, float, float]]) -> None:
    history, now_s = History(), 0.0
    for gap_s, lived_s, uniform in crashes:
        now_s += gap_s
        history, decision = after_crash(POLICY, history, now_s, lived_s, lambda drawn=uniform: drawn)  # type: ignore[misc]  # a bound default
        assert len(history.crashes) < POLICY.crashes
        if isinstance(decision, Restart):
            assert now_s <= decision.at_s <= now_s + POLICY.cap_s
        else:
            assert decision.until_s == now_s + POLICY.quarantine_s
