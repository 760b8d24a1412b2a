"""Tracks and assignments: exact against brute force, steady under noise, misses and uneven time."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from agent.worker.assignment import best_pairs
from agent.worker.tracker import Tracker, TrackerSettings, distinct_objects
from models.tasks.detection import Detection


def box(x: float, y: float, label: str = "ball", score: float = 0.9, size: float = 40) -> Detection:
    return Detection(label, score, x - size / 2, y - size / 2, x + size / 2, y + size / 2)


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(
        lambda shape: arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.0, 0.1, 0.2, 0.35, 0.5, 0.8, 1.0]))
    )
)
def test_pairs_add_up_to_the_most_there_is(similarity: np.ndarray) -> None:
    pairs = best_pairs(similarity)
    assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
    assert all(similarity[pair] > 0 for pair in pairs)
    rows, columns = similarity.shape
    padded = np.zeros((max(rows, columns),) * 2)
    padded[:rows, :columns] = similarity
    best = max(sum(padded[row, column] for row, column in enumerate(order)) for order in itertools.permutations(range(len(padded))))
    assert sum(similarity[pair] for pair in pairs) == pytest.approx(best)


def test_a_crowd_of_eighty_keeps_its_numbers() -> None:
    rng = np.random.default_rng(5)
    places, speeds = rng.uniform(0, 1500, (80, 2)), rng.normal(0, 40, (80, 2))
    tracker = Tracker(TrackerSettings())
    owners: dict[int, set[int]] = {}
    for frame in range(40):
        now = places + speeds * frame / 10
        update = tracker.update([box(x, y) for x, y in now], frame / 10)
        for track in update.tracks:
            if track.is_confirmed and track.is_seen:
                middle = np.array(((track.x0 + track.x1) / 2, (track.y0 + track.y1) / 2))
                owners.setdefault(track.track, set()).add(int(np.argmin(np.linalg.norm(now - middle, axis=1))))
    assert len(owners) <= 84
    assert sum(len(each) == 1 for each in owners.values()) >= 70


@pytest.mark.parametrize("fps", [4.0, 10.0, 25.0])
def test_speed_is_in_seconds_so_uneven_frames_do_not_matter(fps: float) -> None:
    rng = random.Random(2)
    tracker, at_s, numbers = Tracker(TrackerSettings()), 0.0, set()
    while at_s < 6:
        update = tracker.update([box(50 + 120 * at_s + rng.gauss(0, 1), 100 + rng.gauss(0, 1))], at_s)
        numbers |= {track.track for track in update.tracks}
        at_s += rng.uniform(0.4, 1.6) / fps
    assert numbers == {1}


def test_a_hidden_object_comes_back_under_its_number_where_it_should_be() -> None:
    tracker = Tracker(TrackerSettings())
    for frame in range(10):
        tracker.update([box(50 + 15 * frame, 100)], frame / 10)
    hidden = tracker.update([], 1.4)
    (ghost,) = hidden.tracks
    assert not ghost.is_seen
    assert (ghost.x0 + ghost.x1) / 2 == pytest.approx(50 + 15 * 14, abs=6)
    (track,) = tracker.update([box(50 + 15 * 17, 100)], 1.7).tracks
    assert (track.track, track.is_seen) == (1, True)
    ended = tracker.update([], 2.8).ended
    assert [each.track for each in ended] == [1]


def test_weak_detections_hold_a_track_but_begin_none() -> None:
    tracker = Tracker(TrackerSettings(sure=0.5))
    assert tracker.update([box(50, 50, score=0.3)], 0.0).tracks == ()
    for frame in range(1, 4):
        tracker.update([box(50, 50)], frame / 10)
    for frame in range(4, 30):
        (track,) = tracker.update([box(50, 50, score=0.25)], frame / 10).tracks
        assert (track.track, track.is_seen, track.sure_s) == (1, True, 0.3)
    assert tracker.update([box(50, 50, score=0.25)], 3.4).ended[0].track == 1


def test_one_object_that_looks_like_two_things_is_one_track_with_the_better_label() -> None:
    tracker = Tracker(TrackerSettings())
    for frame in range(10):
        pair = [box(50 + frame, 50, "bottle", 0.8), box(51 + frame, 50, "parcel", 0.6 if frame != 4 else 0.95)]
        (track,) = tracker.update(pair, frame / 10).tracks
    assert (track.track, track.label) == (1, "bottle")
    assert len(distinct_objects([box(50, 50), box(120, 50)])) == 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 0.5),
            st.lists(st.tuples(st.floats(0, 600), st.floats(0, 300), st.floats(0.05, 1), st.floats(1, 90)), max_size=6),
        ),
        max_size=25,
    )
)
def test_any_scene_keeps_the_books(frames: list[tuple[float, list[tuple[float, float, float, float]]]]) -> None:
    tracker, at_s = Tracker(TrackerSettings()), 0.0
    alive: set[int] = set()
    dead: set[int] = set()
    for passed_s, objects in frames:
        at_s += passed_s
        update = tracker.update([box(x, y, score=score, size=size) for x, y, score, size in objects], at_s)
        now = {track.track for track in update.tracks}
        ended = {track.track for track in update.ended}
        assert len(now) == len(update.tracks)
        assert not now & (dead | ended)
        assert ended <= alive
        assert alive <= now | ended
        assert all(track.x1 > track.x0 and track.y1 > track.y0 for track in update.tracks)
        assert all(np.isfinite((track.x0, track.y0, track.x1, track.y1)).all() for track in update.tracks)
        alive, dead = now, dead | ended


def test_half_of_an_object_that_is_seen_beside_the_whole_of_it_takes_nothing_from_it() -> None:
    """As people.mp4 has it where somebody leaves the picture: for a frame the legs are a second person, and then the only one."""
    tracker = Tracker(TrackerSettings())
    for frame in range(5):
        tracker.update([Detection("person", 0.9, 20 * frame, 10, 20 * frame + 200, 400)], frame / 10)
    whole, legs = Detection("person", 0.82, 100, 10, 300, 400), Detection("person", 0.66, 104, 120, 300, 400)
    assert [track.track for track in tracker.update([whole, legs], 0.5).tracks] == [1]
    (track,) = tracker.update([Detection("person", 0.75, 124, 120, 320, 400)], 0.6).tracks
    assert (track.track, track.is_seen) == (1, True)
    beside = Detection("person", 0.8, 330, 20, 460, 400)
    assert len(tracker.update([Detection("person", 0.8, 144, 30, 340, 400), beside], 0.7).tracks) == 2
