"""The demo's promise: a minute of rendered belt, the shipped detector, the real pipeline, counted within 2 % of the truth."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from agent.worker.camera import Camera
from agent.worker.events import Event
from agent.worker.lines import Line
from agent.worker.pipeline import Pipeline, PipelineSettings
from agent.worker.sources import parse_source
from models.conveyor import Conveyor
from models.engines import EngineOptions, open_engine
from models.manifest import DetectionManifest, manifest_from_mapping
from models.tasks.detection import Detector

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODELS = Path(__file__).parents[3] / "models"


def conveyor_detector(tmp_path: Path) -> Detector:
    manifest = manifest_from_mapping(tomllib.loads((MODELS / "manifests/conveyor-detr.toml").read_text()))
    assert isinstance(manifest, DetectionManifest)
    (tmp_path / "model.onnx").symlink_to(MODELS / "weights/conveyor_detr.onnx")
    return Detector(open_engine(tmp_path, EngineOptions(threads=2)), manifest)


@pytest.mark.parametrize(("seed", "fps"), [(0, 10.0), (2, 6.0)])
def test_a_minute_of_belt(tmp_path: Path, seed: int, fps: float) -> None:
    settings = PipelineSettings("belt", f"conveyor:?seed={seed}&pace=none&seconds=62", "conveyor-detr", fps=fps, line=Line())
    camera = Camera(parse_source(settings.source, settings.width, settings.height, settings.fps), lambda: None)
    pipeline = Pipeline(settings, conveyor_detector(tmp_path), camera, unix_s=lambda at_s, captured_s: at_s)
    events: list[Event] = []
    camera.start()
    try:
        while camera.state(0).name != "ended" or camera.slot.has_frame:
            if pipeline.due_s(time.monotonic()) is None:
                time.sleep(0.0005)
                continue
            look = pipeline.look()
            assert look is not None
            events.extend(look.events)
    finally:
        camera.stop()
        camera.join()
    crossings = [event.data for event in events if event.kind == "crossed" and event.data["at_s"] <= 60]
    truth = Conveyor(seed).crossed(60)
    assert sum(truth.values()) > 35
    for label, expected in truth.items():
        assert sum(each["label"] == label for each in crossings) == pytest.approx(expected, rel=0.02), label
    assert all(each["direction"] == "forward" for each in crossings)
    status = pipeline.status()
    assert status["processed"] == 62 * fps + 1
    assert not any(status["skipped"].values())
    assert status["counts"] == status["truth"]
