"""Line crossings, on paths whose truth is known."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.worker.lines import Crossing, Line, LineCounter
from agent.worker.tracker import Track, Tracker, TrackerSettings
from models.conveyor import Conveyor
from models.conveyor_sprites import LABELS
from models.tasks.detection import Detection


def at(x: float, y: float, number: int = 1, label: str = "person", is_confirmed: bool = True, first_s: float = 0.0) -> Track:
    return Track(number, label, 0.9, x - 10, y - 20, x + 10, y + 20, is_confirmed, True, first_s, 0.0, 0.0)


def walk(counter: LineCounter, points: Sequence[tuple[float, float]], number: int = 1) -> list[Crossing]:
    return [crossing for step, (x, y) in enumerate(points) for crossing in counter.update([at(x, y, number)], step / 10)]


@given(st.lists(st.tuples(st.floats(0, 200), st.floats(5, 95)), min_size=1, max_size=40))
def test_a_track_counts_once_and_only_if_it_changed_sides(points: list[tuple[float, float]]) -> None:
    crossings = walk(LineCounter(Line(), 200, 100), points)
    changed = [side for side in (x - 100 for x, _ in points) if abs(side) >= 1]
    crosses = any((one > 0) != (other > 0) for one, other in zip(changed, changed[1:]))
    assert len(crossings) <= 1
    if crosses:
        assert len(crossings) == 1
    if crossings:
        assert 0 <= crossings[0].at_s <= len(points) / 10


@given(st.lists(st.floats(-0.99, 0.99), min_size=2, max_size=60))
def test_trembling_on_the_line_does_not_count(trembles: list[float]) -> None:
    assert walk(LineCounter(Line(), 200, 100), [(100 + each, 50) for each in trembles]) == []


def test_direction_time_anchor_and_the_ends_of_the_line() -> None:
    (right,) = walk(LineCounter(Line(), 200, 100), [(80, 50), (95, 50), (115, 50)])
    assert right.direction == "forward"
    assert right.at_s == pytest.approx(0.1 + 0.1 * 5 / 20)
    (left,) = walk(LineCounter(Line(), 200, 100), [(115, 50), (85, 50)])
    assert left.direction == "backward"
    (turned,) = walk(LineCounter(Line((0.5, 1.0), (0.5, 0.0)), 200, 100), [(80, 50), (120, 50)])
    assert turned.direction == "backward"
    assert walk(LineCounter(Line((0.5, 0.0), (0.5, 0.4)), 200, 100), [(80, 50), (120, 50)]) == []
    foot = LineCounter(Line((0.0, 0.5), (1.0, 0.5), anchor="foot"), 200, 100)
    (down,) = walk(foot, [(100, 20), (100, 45)])
    assert down.direction == "backward"
    with pytest.raises(ValueError, match="no length"):
        LineCounter(Line((0.5, 0.5), (0.5, 0.5)), 200, 100)


def test_a_track_that_crosses_before_it_is_confirmed_counts_when_it_is() -> None:
    counter = LineCounter(Line(), 200, 100)
    assert counter.update([at(95, 50, is_confirmed=False)], 0.0) == []
    assert counter.update([at(108, 50, is_confirmed=False)], 0.1) == []
    (crossing,) = counter.update([at(120, 50)], 0.2)
    assert crossing.at_s == pytest.approx(0.1 * 5 / 13)


@pytest.mark.parametrize("seed", range(4))
def test_a_minute_of_belt_is_counted_exactly_from_noisy_boxes(seed: int) -> None:
    """5 % of the objects missed, 3 % noise on each edge, 2 % wrong labels, scores down to 0.35, at 15 frames a second."""
    belt, rng = Conveyor(seed), random.Random(seed)
    tracker, counter = Tracker(TrackerSettings()), LineCounter(Line(), belt.width, belt.height)
    crossings: list[Crossing] = []
    for frame in range(62 * 15):
        update = tracker.update(noisy(belt, frame / 15, rng), frame / 15)
        crossings += counter.update(update.tracks, frame / 15)
    counted = {label: sum(each.label == label and each.at_s <= 60 for each in crossings) for label in LABELS}
    assert counted == belt.crossed(60)
    assert all(each.direction == "forward" for each in crossings)


def noisy(belt: Conveyor, at_s: float, rng: random.Random) -> list[Detection]:
    found = []
    for each in belt.truth(at_s):
        if rng.random() >= 0.05:
            label = each.label if rng.random() >= 0.02 else rng.choice(LABELS)
            x, y = 0.03 * (each.x1 - each.x0), 0.03 * (each.y1 - each.y0)
            edges = (each.x0 + rng.gauss(0, x), each.y0 + rng.gauss(0, y), each.x1 + rng.gauss(0, x), each.y1 + rng.gauss(0, y))
            found.append(Detection(label, rng.uniform(0.35, 0.95), *edges))
    return found


def test_a_line_that_counts_every_crossing_counts_people_who_come_back() -> None:
    path = [(80.0, 50.0), (120.0, 50.0), (80.0, 50.0), (120.0, 50.0)]
    assert [each.direction for each in walk(LineCounter(Line(), 200, 100), path)] == ["forward"]
    both = walk(LineCounter(Line(counts="every", name="door"), 200, 100), path)
    assert [(each.line, each.direction) for each in both] == [("door", "forward"), ("door", "backward"), ("door", "forward")]
