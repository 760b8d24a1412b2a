"""Real people, a real detector, the count of a human eye.

people.mp4 (139 s, 10 frames a second, one person at a time) was counted by hand on a contact sheet of every tenth frame, and the frames
between were held against the empty room: six stretches differ from it, frames 60-200, 227-449, 502-700, 745-869, 921-1201, 1235-1360, and
each shows one person, another one each time, who comes in below, stands at the table for 8 to 25 s, and leaves to the right. The frame
in which the middle of the body passes three quarters of the picture's width was read from strips of every third frame.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import av
import pytest

from agent.worker.areas import Zone
from agent.worker.camera import Camera
from agent.worker.events import Event
from agent.worker.lines import Line
from agent.worker.meaning import Meaning, Moment
from agent.worker.pipeline import UNSURE, Pipeline
from agent.worker.settings import PipelineSettings
from agent.worker.sources import parse_source
from models.engines import EngineOptions, open_engine
from models.manifest import DetectionManifest, manifest_from_mapping
from models.tasks.detection import Detector

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODELS = Path(__file__).parents[3] / "models"
FPS = 10.0
LEFT_AT = (188, 439, 689, 857, 1187, 1349)
READ_WITHIN = 3
EVERY = 3

WISHES: dict[str, Any] = {
    "labels": ("person",),
    "lines": (Line((0.75, 0.0), (0.75, 1.0), name="exit"),),
    "zones": (Zone("table", ((0.35, 0.5), (0.72, 0.5), (0.72, 1.0), (0.35, 1.0)), loitering_s={"person": 5.0}),),
}


@pytest.fixture
def detector(test_data: Path, tmp_path: Path) -> Detector:
    manifest = manifest_from_mapping(tomllib.loads((MODELS / "manifests/deimv2-atto.toml").read_text()))
    assert isinstance(manifest, DetectionManifest)
    (tmp_path / "model.onnx").symlink_to(test_data / "models/deimv2_hgnetv2_atto_coco_raw.onnx")
    return Detector(open_engine(tmp_path, EngineOptions(threads=2)), manifest)


def as_counted_by_hand(events: list[Event]) -> None:
    crossings = [event.data for event in events if event.kind == "crossed"]
    assert [(each["line"], each["direction"]) for each in crossings] == [("exit", "forward")] * len(LEFT_AT)
    for crossing, frame in zip(crossings, LEFT_AT):
        assert crossing["at_s"] * FPS == pytest.approx(frame, abs=READ_WITHIN)
    people = [event.data for event in events if event.kind == "object"]
    assert [each["type"] for each in people if each["type"] != "update"] == ["new", "end"] * len(LEFT_AT)
    for end in (each for each in people if each["type"] == "end"):
        assert end["entered_zones"] == ["table"]
        assert 8 <= end["dwell_s"]["table"] <= 28
        assert end["crossed"] == [{"line": "exit", "direction": "forward"}]
    assert {each["track"] for each in people if each["is_loitering"]} == {each["track"] for each in people}
    assert [event.data["count"] for event in events if event.kind == "zone"] == [1, 0] * len(LEFT_AT)


def test_as_many_people_leave_as_were_counted_by_hand(detector: Detector, test_data: Path) -> None:
    """At 3.3 frames a second: every third frame, which a small device can keep up with."""
    meaning = Meaning(PipelineSettings("room", "file:/people.mp4", "deimv2-atto", **WISHES), detector.facts.threshold)
    events: list[Event] = []
    with av.open(str(test_data / "data/people.mp4")) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % EVERY == 0:
                found = detector.detect(frame.to_ndarray(format="bgr24"), detector.facts.threshold * UNSURE)
                moment = Moment(number / FPS, number / FPS, frame.width, frame.height, lambda: b"")
                events += meaning.see(found, moment)[0]
    as_counted_by_hand(events + meaning.lose_sight())


@pytest.mark.slow
def test_the_whole_pipeline_counts_them_in_every_frame(detector: Detector, test_data: Path) -> None:
    source = f"file:{test_data}/data/people.mp4?pace=none"
    wishes = PipelineSettings("room", source, "deimv2-atto", **WISHES)
    wishes.check()
    camera = Camera(parse_source(source, 640, 360, FPS), lambda: None)
    pipeline = Pipeline(wishes, detector, camera, unix_s=lambda at_s, captured_s: at_s)
    events: list[Event] = []
    camera.start()
    try:
        while camera.state(0).name != "ended" or camera.slot.has_frame:
            if pipeline.due_s(time.monotonic()) is None:
                time.sleep(0.0005)
                continue
            look = pipeline.look()
            assert look is not None
            events += look.events
    finally:
        camera.stop()
        camera.join()
    events += [event for event in pipeline.camera_events() if event.kind != "camera"]
    as_counted_by_hand(events)
    assert pipeline.status()["processed"] == 1394
