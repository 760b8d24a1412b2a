"""Line crossings, events and counts, on paths whose truth is known."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.worker.events import Announcer
from agent.worker.tracker import Track, Tracker, TrackerSettings, Update
from agent.worker.zones import Crossing, Line, LineCounter
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
    crosses = any((one > 0) != (other > 0) for one, other in itertools.pairwise(changed))
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


def test_new_and_end_are_told_once_and_flicker_is_not() -> None:
    announcer = Announcer(["person"])
    kinds: list[str] = []
    for step in range(10):
        tracks = (at(50, 50), at(90, 50, 2, "dog"), at(10, 10, 3, first_s=step / 10))
        kinds += [event.kind for event in announcer.update(Update(tracks, ()), [], step / 10)]
    assert kinds == ["new"]
    assert announcer.present == {"person": 2}
    gone = announcer.update(Update((), (at(50, 50), at(10, 10, 3))), [], 1.5)
    assert [(event.kind, event.data["track"]) for event in gone] == [("end", 1)]


def test_a_flood_is_cut_and_counted_but_crossings_are_always_told() -> None:
    announcer = Announcer()
    flood = tuple(at(50, 50, number) for number in range(500))
    crossings = [Crossing(number, "person", "forward", 1.0) for number in range(500)]
    events = announcer.update(Update(flood, ()), crossings, 1.0)
    assert sum(event.kind == "new" for event in events) == 30
    assert announcer.dropped == 470
    assert sum(event.kind == "crossed" for event in events) == 500
    assert announcer.counts() == {"person": 500}
    later = announcer.update(Update(flood, ()), [], 2.0)
    assert len(later) == 10


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
