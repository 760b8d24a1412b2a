"""Pipelines that hold back: by order while the device is needed elsewhere, by themselves where nothing moves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from agent.worker.areas import Zone
from agent.worker.camera import Camera, Frame
from agent.worker.meaning import Meaning, Moment
from agent.worker.motion import MotionGate
from agent.worker.pipeline import Pipeline
from agent.worker.settings import Motion, PipelineSettings
from agent.worker_protocol import CameraEvent, Pace
from models.pictures import Picture
from models.record import RecordError
from models.tasks.detection import Detection, Detector
from tests.agent.worker.test_vision import Bench, closing


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with closing(Bench(tmp_path)) as made:
        yield made


def test_cameras_go_at_the_pace_they_are_told_but_not_below_their_floor_and_keep_their_tracks(bench: Bench) -> None:
    bench.start("slow", "conveyor:?seed=3&fps=30", fps=12.0, floor_fps=0.0)
    bench.start("floor", "conveyor:?seed=4&fps=30", fps=12.0, floor_fps=4.0)
    before = bench.work_until(lambda each: all(pipeline["processed"] >= 15 for pipeline in each.values()), "looks, so that all is told")
    assert not before["slow"]["is_slowed"]
    bench.service.handle(Pace(5, 2.0), b"")
    bench.start("late", "conveyor:?seed=5&fps=30", fps=12.0, floor_fps=1.0)
    sent = len(bench.reports)
    began_s = time.monotonic()
    between = bench.work(3.0)
    late = 4 * (time.monotonic() - began_s - 3.0)  # a busy machine ends its last step when it can
    looks = {name: between[name]["processed"] - before.get(name, {"processed": 0})["processed"] for name in between}
    assert 5 <= looks["slow"] <= 8 + late
    assert 11 <= looks["floor"] <= 14 + late
    assert 5 <= looks["late"] <= 8 + late
    assert all(each["is_slowed"] for each in between.values())
    new = [each.data for each in bench.reports[sent:] if isinstance(each, CameraEvent) and each.data.get("type") == "new"]
    assert len(new) <= 14, "tracks were lost between two looks"
    bench.service.handle(Pace(6, 0.0), b"")
    paused = bench.work(1.0)["slow"]["processed"]
    assert bench.work(1.0)["slow"]["processed"] == paused
    bench.service.handle(Pace(7, None), b"")
    after = bench.work(1.5)
    assert after["slow"]["processed"] - paused >= 12
    assert not any(each["is_slowed"] for each in after.values())
    with pytest.raises(RecordError, match="fps -1"):
        bench.service.handle(Pace(8, -1.0), b"")


def test_the_gate_sees_what_moves_and_what_creeps_and_looks_again_in_any_case() -> None:
    rng = np.random.default_rng(1)
    ground = rng.integers(60, 120, (360, 640, 3), np.uint8)

    def frame(x: int | None) -> Picture:
        picture = np.clip(ground + rng.normal(0, 3, ground.shape), 0, 255).astype(np.uint8)
        if x is not None:
            picture[200:260, x : x + 40] = 255
        return picture

    gate = MotionGate(Motion(True, min_share=0.002, forced_s=10.0))
    assert gate.lets_through(frame(None), 0.0)
    assert not any(gate.lets_through(frame(None), step / 10) for step in range(1, 20))
    assert all(gate.lets_through(frame(50 * step), 2 + step / 10) for step in range(8))
    creeping = [gate.lets_through(frame(350 + step), 3 + step / 10) for step in range(40)]
    assert 3 <= sum(creeping) <= 20
    assert not gate.lets_through(frame(389), 7.1)
    assert gate.lets_through(frame(389), 17.5)


def test_who_stands_still_stays_who_he_is_and_begins_to_loiter_without_a_look() -> None:
    everywhere = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
    meaning = Meaning(PipelineSettings("door", "conveyor:", "m", zones=(Zone("all", everywhere, loitering_s=5),)), 0.5)
    person = Detection("person", 0.9, 80, 20, 120, 90)
    told = []
    for step in range(100):
        at_s = step / 10
        moment = Moment(at_s, at_s, 200, 100, lambda: b"jpeg")
        told += (meaning.see([person], moment) if step < 10 or step >= 90 else meaning.see_nothing_moved(moment))[0]
    objects = [(event.data["type"], event.data["is_loitering"]) for event in told if event.kind == "object"]
    assert objects[0] == ("new", [])
    assert objects[-1] == ("update", ["all"])
    assert {event.data["track"] for event in told if event.kind == "object"} == {1}
    assert meaning.status()["zones"] == {"all": {"person": 1}}


class Finder:
    """A detector that finds a person wherever the picture is white."""

    facts = SimpleNamespace(threshold=0.5)

    def __init__(self) -> None:
        self.looks = 0

    def detect(self, picture: Picture, threshold: float) -> tuple[Detection, ...]:
        self.looks += 1
        rows, columns = np.nonzero(picture[:, :, 0] > 200)
        if not rows.size:
            return ()
        return (Detection("person", 0.9, float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)),)


@pytest.mark.parametrize("fps", [10.0, 1.0])
def test_who_leaves_a_still_scene_is_gone_as_soon_as_without_a_gate(fps: float) -> None:
    """Between two looks everything was held as it had been seen, the unseen too, until the next motion 100 s later."""
    everywhere = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
    settings = PipelineSettings("door", "conveyor:", "m", fps=fps, zones=(Zone("all", everywhere, inertia_frames=1),), motion=Motion(True))
    finder = Finder()
    camera = Camera(settings.parsed_source(), lambda: None)
    pipeline = Pipeline(settings, cast("Detector", finder), camera, unix_s=lambda at_s, _: at_s)
    empty = np.full((90, 160, 3), 80, np.uint8)
    occupied = empty.copy()
    occupied[30:80, 60:90] = 255
    left_s, told = 6.0, []
    status: dict[str, Any] = {}
    for step in range(1, round(110 * fps)):
        at_s = step / fps
        picture = occupied if at_s < left_s else empty
        camera.slot.put(Frame(lambda picture=picture: picture, step, time.monotonic(), at_s))  # type: ignore[misc]
        look = pipeline.look()
        assert look is not None
        told += [(at_s, event) for event in look.events]
        status = status or (dict(pipeline.status()["zones"]) if at_s > left_s + max(1.0, 3 / fps) + 1 else {})
    objects = [(at_s, event.data) for at_s, event in told if event.kind == "object"]
    assert [data["type"] for _, data in objects if data["type"] != "update"] == ["new", "end"]
    ended_s, end = objects[-1]
    assert ended_s <= left_s + max(1.0, 3 / fps) + 1
    assert end["ended_s"] < left_s
    assert end["dwell_s"]["all"] <= left_s + max(1.0, 3 / fps) + 1
    emptied_s = [at_s for at_s, event in told if event.kind == "zone" and event.data["count"] == 0]
    assert emptied_s and emptied_s[0] <= left_s + max(1.0, 3 / fps) + 1
    assert status == {"all": {}}
    assert finder.looks < 12 + 3 * 110 / 10 + fps * max(1.0, 3 / fps) + 8, "the gate stays shut while nothing is missed"


def test_a_still_camera_costs_a_look_in_ten_seconds(bench: Bench, tmp_path: Path) -> None:
    """A film of one picture; one look more makes sure of what the first may have found."""
    from tests.agent.worker.test_recording import film, numbered  # it needs an encoder, which the others do not

    source = film(tmp_path / "still.mp4", 2.0, lambda number: numbered(5))
    bench.start("still", f"file:{source}?loop=no&pace=none", fps=20.0, motion={"enabled": True})
    status = bench.work(1.5)["still"]
    assert 1 <= status["processed"] <= 2
    assert status["skipped"]["still"] == 40 - status["processed"]
