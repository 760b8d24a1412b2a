"""Who is in a zone: by the foot, after some frames, for how long; polygons against an independent judge."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agent.worker.areas import Zone
from agent.worker.polygons import inside
from agent.worker.tracker import Track
from agent.worker.zones import Occupancy, ZoneWatch

LEFT = Zone("left", ((0, 0), (0.5, 0), (0.5, 1), (0, 1)))


def at(x: float, foot: float, number: int = 1, label: str = "person", is_seen: bool = True) -> Track:
    return Track(number, label, 0.9, x - 10, foot - 40, x + 10, foot, True, is_seen, 0.0, 0.0, 0.0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=3, max_size=12),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=20),
)
def test_inside_agrees_with_opencv_off_the_edges(polygon: list[tuple[int, int]], points: list[tuple[int, int]]) -> None:
    contour = np.array(polygon, np.float32).reshape(-1, 1, 2)
    judged = [cv2.pointPolygonTest(contour, (float(x), float(y)), False) for x, y in points]
    assume(any(judged))
    found = inside(np.array(polygon, np.float64), np.array(points, np.float64))
    for verdict, is_inside in zip(judged, found):
        assert verdict == 0 or (verdict > 0) == is_inside


def test_the_foot_decides_and_an_object_cut_off_below_stands_at_the_edge() -> None:
    low = ZoneWatch([Zone("low", ((0, 0.5), (1, 0.5), (1, 1), (0, 1)), inertia_frames=1)])
    stays = low.update([at(50, 49, 1), at(50, 60, 2), at(50, 100, 3), at(50, 104, 4)], 200, 100, 0.0)
    assert {number: stay.zones for number, stay in stays.items()} == dict.fromkeys((2, 3, 4), ("low",))


def test_three_frames_in_a_row_to_enter_and_to_leave_and_time_counts_from_the_first_of_them() -> None:
    watch = ZoneWatch([LEFT])
    xs = [150, 50, 150, 50, 50, 50, 50, 50, 150, 50, 50, 150, 150, 150, 150]
    stays = [watch.update([at(x, 50)], 200, 100, index / 10) for index, x in enumerate(xs)]
    where = [bool(stay.get(1) and stay[1].zones) for stay in stays]
    assert where == [False] * 5 + [True] * 8 + [False] * 2
    assert stays[7][1].dwell_s["left"] == pytest.approx(0.4)
    assert stays[-1][1].dwell_s["left"] == pytest.approx(0.8)
    assert stays[-1][1].entered == ("left",)
    hidden = watch.update([at(50, 50, is_seen=False)], 200, 100, 2.0)
    assert hidden[1].zones == ()
    assert watch.update([], 200, 100, 2.1) == {}


def test_loitering_is_by_label_over_all_visits() -> None:
    zone = Zone("left", LEFT.points, inertia_frames=1, loitering_s={"person": 1.0})
    watch = ZoneWatch([zone])
    loiters = []
    for step in range(30):
        x = 50 if step % 10 < 5 else 150
        stays = watch.update([at(x, 50), at(x, 60, 2, "dog")], 200, 100, step / 10)
        loiters.append([number for number, stay in stays.items() if stay.loitering])
    assert loiters[19] == []
    assert loiters[20] == [1]
    assert loiters[25] == []
    assert zone.loitering_of("dog") == math.inf
    assert Zone("z", LEFT.points, loitering_s=5).loitering_of("dog") == 5


def test_zones_may_concern_some_labels_only() -> None:
    watch = ZoneWatch([Zone("left", LEFT.points, labels=("dog",), inertia_frames=1)])
    assert set(watch.update([at(50, 50, 1), at(60, 50, 2, "dog")], 200, 100, 0.0)) == {2}
    assert watch.occupancy() == {"left": {"dog": 1}}


def test_occupancy_is_told_when_it_settles_and_always_to_the_end() -> None:
    watch = ZoneWatch([Zone("left", LEFT.points, inertia_frames=1)])
    told: list[tuple[float, Occupancy]] = []
    for step in range(40):
        people = [at(50, 50, number) for number in range(step % 4)] if step < 30 else []
        watch.update(people, 200, 100, step / 20)
        told += [(step / 20, change) for change in watch.changes(step / 20)]
    gaps = [later - earlier for (earlier, _), (later, _) in zip(told, told[1:])]
    assert all(gap >= 0.5 - 1e-9 for gap in gaps)
    assert told[-1][1] == Occupancy("left", "person", 0)
    assert watch.occupancy() == {"left": {}}


def test_a_change_keeps_what_is_known_of_zones_that_stay() -> None:
    watch = ZoneWatch([LEFT, Zone("gone", LEFT.points)])
    for step in range(5):
        watch.update([at(50, 50)], 200, 100, step / 10)
    watch.change([Zone("left", LEFT.points, loitering_s=0.5), Zone("new", LEFT.points)])
    stay = watch.update([at(50, 50)], 200, 100, 0.6)[1]
    assert (stay.zones, stay.entered, stay.loitering) == (("left",), ("left",), ("left",))
    moved = Zone("left", ((0.9, 0), (1, 0), (1, 1)))
    watch.change([moved])
    assert watch.update([at(50, 50)], 200, 100, 0.7)[1].entered == ()
