"""What has to go, and that no more than that goes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from agent.cameras.retention import Aged, Keep, too_much

DAY_S = 86_400.0
NOW = 100 * DAY_S
KEEP = Keep(age_s=10 * DAY_S, total_bytes=1000, min_free_bytes=100, count=50)


def event(number: int, age_days: float = 1.0, size_bytes: int = 10, is_clock_sure: bool = True, is_open: bool = False) -> Aged:
    return Aged(number, NOW - age_days * DAY_S, is_clock_sure, is_open, size_bytes)


def test_what_is_too_old_goes_and_nothing_else() -> None:
    assert too_much([event(1, 12), event(2, 11), event(3, 9)], KEEP, NOW, 10_000) == [1, 2]


def test_over_the_budget_the_oldest_go_until_it_is_kept_and_those_without_files_stay() -> None:
    events = [event(1, size_bytes=0), event(2, size_bytes=300), event(3, size_bytes=400), event(4, size_bytes=500)]
    assert too_much(events, KEEP, NOW, 10_000) == [2]
    assert too_much(events, replace(KEEP, total_bytes=600), NOW, 10_000) == [2, 3]


def test_a_full_disk_makes_room_even_below_the_budget() -> None:
    assert too_much([event(1, size_bytes=60), event(2, size_bytes=60), event(3, size_bytes=60)], KEEP, NOW, 0) == [1, 2]


def test_an_event_that_goes_on_is_kept_whatever_its_age() -> None:
    assert too_much([event(1, 50, is_open=True), event(2, 50)], KEEP, NOW, 10_000) == [2]


def test_a_node_that_does_not_know_the_time_throws_nothing_away_for_its_age() -> None:
    assert too_much([event(1, 20_000)], KEEP, None, 10_000) == []


def test_what_was_seen_before_the_clock_was_set_goes_with_its_neighbours() -> None:
    in_1970 = event(1, 20_000, is_clock_sure=False)
    assert too_much([in_1970, event(2, 5)], KEEP, NOW, 10_000) == []
    assert too_much([in_1970, event(2, 11)], KEEP, NOW, 10_000) == [1, 2]


def test_no_more_than_a_number_of_events_is_kept() -> None:
    assert too_much([event(number) for number in range(1, 54)], KEEP, NOW, 10_000) == [1, 2, 3]


def test_a_camera_may_keep_its_events_for_longer_or_shorter_than_the_others() -> None:
    short, long = 2 * DAY_S, 30 * DAY_S
    found = [replace(event(1, 20), age_s=long), replace(event(2, 3), age_s=short), event(3, 3), replace(event(4, 1), age_s=short)]
    assert too_much(found, KEEP, NOW, 10_000) == [2]
    in_1970 = replace(event(1, 20_000, is_clock_sure=False), age_s=long)
    assert too_much([in_1970, event(2, 11)], KEEP, NOW, 10_000) == [2]


events = st.lists(
    st.tuples(st.floats(-5, 40), st.integers(0, 400), st.booleans(), st.booleans()), max_size=60
).map(lambda rows: [event(index, age, size, sure, is_open) for index, (age, size, sure, is_open) in enumerate(rows, 1)])  # fmt: skip


@given(events, st.integers(0, 500))
def test_what_stays_is_within_bounds_unless_it_goes_on(found: list[Aged], free_bytes: int) -> None:
    going = set(too_much(found, KEEP, NOW, free_bytes))
    staying = [each for each in found if each.number not in going]
    closed = [each for each in staying if not each.is_open]
    assert len(staying) <= KEEP.count or not closed
    assert sum(each.size_bytes for each in staying) <= KEEP.total_bytes or not any(each.size_bytes for each in closed)
    freed = sum(each.size_bytes for each in found if each.number in going)
    assert free_bytes + freed >= KEEP.min_free_bytes or not any(each.size_bytes for each in closed)
    assert not any(each.is_open for each in found if each.number in going)
