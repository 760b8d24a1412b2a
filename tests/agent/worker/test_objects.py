"""The life of objects as it is told: once new, updates on change only, once ended; and what a scene means in all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.worker.areas import Mask, Zone
from agent.worker.events import Allowance, Event
from agent.worker.lines import Line
from agent.worker.meaning import Meaning, Moment
from agent.worker.objects import Objects, Scene, fresh_id, quality_of
from agent.worker.settings import PipelineSettings
from agent.worker.tracker import Track, Update
from agent.worker.zones import Stay
from models.tasks.detection import Detection

HERE: Mapping[int, Stay] = {}


def at(x: float, y: float, number: int = 1, label: str = "person", first_s: float = 0.0, last_s: float = 0.0, score: float = 0.9) -> Track:
    return Track(number, label, score, x - 10, y - 20, x + 10, y + 20, True, True, first_s, last_s, last_s)


def scene(tracks: Iterable[Track], at_s: float, ended: Iterable[Track] = (), stays: Mapping[int, Stay] = HERE) -> Scene:
    return Scene(Update(tuple(tracks), tuple(ended)), (), stays, at_s, 1000 + at_s, 200, 100, lambda: b"jpeg at %.1f" % at_s)


def told(events: Sequence[Event], *fields: str) -> list[tuple[Any, ...]]:
    return [tuple(event.data[field] for field in fields) for event in events if event.kind == "object"]


def telling(objects: Objects, allowance: Allowance, what: Scene) -> list[Event]:
    allowance.pass_to(what.at_s)
    return objects.update(what)


def test_new_after_half_a_second_and_end_once_and_flicker_is_not_told() -> None:
    allowance = Allowance()
    objects = Objects(["person"], allowance)
    events: list[Event] = []
    for step in range(10):
        tracks = (at(50, 50), at(90, 50, 2, "dog"), at(10, 10, 3, first_s=step / 10))
        events += telling(objects, allowance, scene(tracks, step / 10))
    assert told(events, "type", "track", "started_s", "ended_s", "has_snapshot", "snapshot_box") == [
        ("new", 1, 1000.0, None, True, [40.0, 30.0, 60.0, 70.0])
    ]
    assert events[0].payload == b"jpeg at 0.5"
    assert objects.present == {"person": 2}
    gone = telling(objects, allowance, scene((), 1.5, ended=(at(50, 50, last_s=0.9), at(10, 10, 3))))
    assert told(gone, "type", "track", "id", "ended_s") == [("end", 1, events[0].data["id"], 1000.9)]
    assert telling(objects, allowance, scene((), 1.6)) == []


def test_updates_come_on_change_only_and_at_most_once_a_second() -> None:
    allowance = Allowance()
    objects = Objects([], allowance)
    yard, door = Stay(("yard",), ("yard",)), Stay(("yard", "door"), ("yard", "door"), {"yard": 1.0}, ("door",))
    events: list[Event] = []
    for step in range(60):
        at_s = step / 10
        stay = yard if at_s < 2.0 else door
        events += telling(objects, allowance, scene([at(50, 50)], at_s, stays={1: stay}))
    assert told(events, "type", "zones", "is_loitering") == [("new", ["yard"], []), ("update", ["yard", "door"], ["door"])]
    trembling = [telling(objects, allowance, scene([at(50, 50)], 6 + n / 10, stays={1: (yard, door)[n % 2]})) for n in range(40)]
    assert 3 <= sum(map(len, trembling)) <= 4


def test_a_better_picture_is_told_with_the_box_it_was_taken_at() -> None:
    allowance = Allowance()
    objects = Objects([], allowance)
    events: list[Event] = []
    for step in range(40):
        size = 5 + step
        track = Track(1, "person", 0.9, 100 - size, 50 - size, 100 + size, 50 + size, True, True, 0, step / 10, step / 10)
        events += telling(objects, allowance, scene([track], step / 10))
    pictures = [event for event in events if event.data["has_snapshot"]]
    assert 3 <= len(pictures) <= 5
    for event in pictures:
        taken_s = float(event.payload.split()[-1])
        size = 5 + round(taken_s * 10)
        assert event.data["snapshot_box"] == [100 - size, 50 - size, 100 + size, 50 + size]
    assert all(bool(event.payload) == event.data["has_snapshot"] for event in events)


def test_a_cut_off_object_is_a_poorer_picture_than_a_whole_one() -> None:
    assert quality_of(at(0, 50), 200, 100) < quality_of(at(50, 50, score=0.6), 200, 100)


def test_in_a_flood_new_objects_are_told_late_and_what_leaves_untold_is_counted() -> None:
    allowance = Allowance()
    objects = Objects([], allowance)
    flood = [at(50, 50, number) for number in range(100)]
    first = telling(objects, allowance, scene(flood, 1.0))
    assert len(first) == 30
    assert len(telling(objects, allowance, scene(flood, 2.0))) == 10
    gone = telling(objects, allowance, scene((), 3.0, ended=flood))
    assert told(gone, "type") == [("end",)] * 40
    assert allowance.dropped == 60
    assert objects.open_ids == ()


def test_ids_carry_the_time_and_do_not_repeat() -> None:
    ids = {fresh_id(1700000000.1234) for _ in range(200)}
    assert len(ids) == 200
    assert all(re.fullmatch(r"1700000000123-[0-9a-f]{6}", each) for each in ids)


def person(x: float, y: float, score: float = 0.9) -> Detection:
    return Detection("person", score, x - 8, y - 20, x + 8, y)


def moment(at_s: float) -> Moment:
    return Moment(at_s, 1000 + at_s, 200, 100, lambda: b"jpeg")


HALF = ((0.5, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0))


def test_a_walk_through_a_zone_over_a_line_and_away() -> None:
    wishes = PipelineSettings(
        "door", "conveyor:", "m", lines=(Line(name="sill", anchor="foot"),), zones=(Zone("right", HALF, loitering_s={"person": 1.5}),)
    )
    meaning = Meaning(wishes, 0.5)
    events: list[Event] = []
    for step in range(60):
        events += meaning.see([person(60 + 2 * step, 80)] if step < 50 else [], moment(step / 10))[0]
    for step in range(60, 80):
        events += meaning.see([], moment(step / 10))[0]
    (crossed,) = [event.data for event in events if event.kind == "crossed"]
    assert (crossed["line"], crossed["direction"], crossed["label"], crossed["count"]) == ("sill", "forward", "person", 1)
    assert crossed["at_s"] == pytest.approx(1002.0, abs=0.15)
    assert [event.data for event in events if event.kind == "zone"] == [
        {"zone": "right", "label": "person", "count": 1},
        {"zone": "right", "label": "person", "count": 0},
    ]
    types = [kind for (kind,) in told(events, "type")]
    assert (types[0], types[-1], types.count("new"), types.count("end")) == ("new", "end", 1, 1)
    (end,) = [event.data for event in events if event.kind == "object" and event.data["type"] == "end"]
    assert end["zones"] == end["is_loitering"] == []
    assert end["entered_zones"] == ["right"]
    assert end["crossed"] == [{"line": "sill", "direction": "forward"}]
    assert end["dwell_s"]["right"] == pytest.approx(3.0, abs=1.2)
    assert any(loitering == ["right"] for (loitering,) in told(events, "is_loitering"))
    assert meaning.status()["zones"] == {"right": {}}
    assert meaning.status()["open_events"] == []


def test_a_camera_that_is_lost_ends_what_was_open_and_empties_the_zones() -> None:
    meaning = Meaning(PipelineSettings("door", "conveyor:", "m", zones=(Zone("right", HALF),)), 0.5)
    events: list[Event] = []
    for step in range(20):
        events += meaning.see([person(150, 80)], moment(step / 10))[0]
    lost = meaning.lose_sight()
    assert told(lost, "type", "ended_s") == [("end", 1001.9)]
    assert [event.data["count"] for event in lost if event.kind == "zone"] == [0]
    assert meaning.lose_sight() == []
    again = [event for step in range(20) for event in meaning.see([person(150, 80)], moment(30 + step / 10))[0]]
    (first,), (second,) = told(events, "track"), told(again, "track")
    assert second > first
    assert [event.data["count"] for event in again if event.kind == "zone"] == [1]


def test_a_change_keeps_the_track_and_the_event_and_throws_pictures_away_that_show_what_is_masked_now() -> None:
    before = PipelineSettings("door", "conveyor:", "m", zones=(Zone("right", HALF),), lines=(Line(name="sill"),))
    meaning = Meaning(before, 0.5)
    events: list[Event] = []
    for step in range(20):
        events += meaning.see([person(150, 80)], moment(step / 10))[0]
    # A bigger person is a better picture, which waits for its second to pass.
    for step in range(3):
        events += meaning.see([Detection("person", 0.95, 140, 30 - step, 160, 80)], moment(2.0 + step / 10))[0]
    after = PipelineSettings(
        "door",
        "conveyor:",
        "m",
        fps=3,
        zones=(Zone("right", HALF), Zone("all", ((0, 0), (1, 0), (1, 1), (0, 1)))),
        masks=(Mask("m", HALF),),
    )
    meaning.change(after)
    meaning.expect(0.4, 3.0)
    later = [event for step in range(30) for event in meaning.see([person(150, 80)], moment(2.4 + step / 10))[0]]
    ids = {identity for (identity,) in told(events + later, "id")}
    assert len(ids) == 1
    assert all(kind == "update" for (kind,) in told(later, "type"))
    assert told(later, "zones")[-1] == (["right", "all"],)
    assert meaning.status()["lines"] == {}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.02, 0.6), st.lists(st.tuples(st.floats(0, 200), st.floats(20, 100), st.floats(0.2, 1)), max_size=5)),
        max_size=40,
    ),
    st.integers(0, 40),
)
def test_every_new_has_one_end_and_nothing_is_told_in_between_of_others(
    frames: list[tuple[float, list[tuple[float, float, float]]]], lost_at: int
) -> None:
    meaning = Meaning(PipelineSettings("door", "conveyor:", "m", zones=(Zone("right", HALF, inertia_frames=1),), line=Line()), 0.5)
    at_s = 0.0
    events: list[Event] = []
    for index, (passed_s, people) in enumerate(frames):
        at_s += passed_s
        events += meaning.see([person(*each) for each in people], moment(at_s))[0]
        if index == lost_at:
            events += meaning.lose_sight()
    events += meaning.lose_sight()
    open_ids: set[str] = set()
    ended: set[str] = set()
    numbers: dict[int, str] = {}
    for identity, kind, track in told(events, "id", "type", "track"):
        assert identity not in ended
        assert (kind == "new") == (identity not in open_ids)
        assert numbers.setdefault(track, identity) == identity
        open_ids.add(identity)
        if kind == "end":
            open_ids.discard(identity)
            ended.add(identity)
    assert not open_ids
    counts = {"right": 0}
    for event in events:
        if event.kind == "zone":
            assert event.data["count"] != counts["right"]
            counts["right"] = event.data["count"]
    assert counts["right"] == 0
