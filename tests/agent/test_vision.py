"""Cameras and pictures through a real worker process, asked as the HTTP side asks."""

from __future__ import annotations

import io
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import cv2
import numpy as np
import pytest

from agent.errors import WorkerRefused
from agent.supervision.worker import Worker
from agent.vision import VisionService
from agent.worker_protocol import CameraEvent, CloseModel, OpenModel, Report, StartPipeline, StopPipeline
from models.pictures import decode_picture

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, str(ROOT / "agent/worker/__main__.py"))
DEADLINE_S = 30.0


class Node:
    """A worker process with the belt's detector, and what it told."""

    def __init__(self, folder: Path) -> None:
        self.events: list[CameraEvent] = []
        self.worker = Worker("vision", COMMAND, on_report=self._take)
        self.vision = VisionService(self.worker, lambda event, payload: self.events.append(event))
        self._folder = folder

    def _take(self, report: Report, payload: bytes) -> None:
        self.vision.on_report(report, payload)

    async def open(self) -> None:
        await self.worker.until_running(DEADLINE_S)
        if not (self._folder / "model.onnx").exists():
            (self._folder / "model.onnx").symlink_to(ROOT / "models/weights/conveyor_detr.onnx")
        manifest = tomllib.loads((ROOT / "models/manifests/conveyor-detr.toml").read_text())
        await self.worker.call(OpenModel(0, "conveyor-detr", manifest, str(self._folder), {"threads": 1}))

    async def start(self, **settings: Any) -> None:
        values = {"source": "conveyor:?seed=3", "model": "conveyor-detr", "line": {}, **settings}
        await self.worker.call(StartPipeline(0, "belt", values))

    async def until(self, condition: Callable[[], object], what: str) -> None:
        with anyio.move_on_after(DEADLINE_S):
            while not condition():  # noqa: ASYNC110  # what is waited for happens in another process
                await anyio.sleep(0.02)
            return
        raise AssertionError(f"not within {DEADLINE_S} s: {what}; cameras {json.dumps(self.vision.cameras())}")


@asynccontextmanager
async def node(folder: Path) -> AsyncIterator[Node]:
    made = Node(folder)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(made.worker.run)
        try:
            await made.open()
            yield made
        finally:
            with anyio.CancelScope(shield=True):
                await made.worker.stop()


def belt(at_s: float = 5.0) -> tuple[bytes, np.ndarray]:
    from models.conveyor import Conveyor

    picture = Conveyor(3).frame(at_s)
    return bytes(cv2.imencode(".png", picture)[1]), picture


@pytest.mark.anyio
async def test_a_camera_is_reported_told_about_and_shown_only_while_watched(tmp_path: Path) -> None:
    async with node(tmp_path) as made:
        await made.start(fps=10.0)
        await made.until(lambda: any(event.kind == "crossed" for event in made.events), "a crossing")
        kinds = [event.kind for event in made.events]
        assert kinds[0] == "camera"
        assert {"object", "crossed"} <= set(kinds)
        await made.until(lambda: made.vision.cameras()[0]["fps"] > 5, "a rate")
        (camera,) = made.vision.cameras()
        assert (camera["id"], camera["state"], camera["source"]) == ("belt", "streaming", "conveyor:?seed=3")
        assert 5 < camera["fps"] < 16
        assert camera["age_ms_p50"] < 1000
        assert not camera["is_watched"]

        jpeg = await made.vision.snapshot("belt")
        assert decode_picture(jpeg).shape == (360, 640, 3)
        sequences = []
        async with aclosing(made.vision.frames("belt")) as frames:
            async for frame in frames:
                sequences.append(frame.sequence)
                if len(sequences) == 5:
                    assert {each["label"] for each in frame.detections} <= {"parcel", "bottle", "ball"}
                    break
        assert sequences == sorted(set(sequences))
        await made.until(lambda: made.vision.cameras()[0]["is_watched"], "watched")
        await made.worker.call(StopPipeline(0, "belt"))
        await made.until(lambda: made.vision.cameras() == [], "no camera")


@pytest.mark.anyio
async def test_a_slow_viewer_sees_the_newest_and_holds_up_nobody(tmp_path: Path) -> None:
    async with node(tmp_path) as made:
        await made.start(fps=15.0, source="conveyor:?seed=3")
        slow: list[int] = []
        fast: list[int] = []

        async def view(sequences: list[int], pause_s: float, count: int) -> None:
            async with aclosing(made.vision.frames("belt")) as frames:
                async for frame in frames:
                    sequences.append(frame.sequence)
                    if len(sequences) == count:
                        return
                    await anyio.sleep(pause_s)

        with anyio.fail_after(DEADLINE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(view, slow, 0.6, 4)
                tasks.start_soon(view, fast, 0.0, 15)
        gaps = [later - earlier for earlier, later in itertools.pairwise(slow)]
        assert min(gaps) >= 3
        assert len(fast) == 15


@pytest.mark.anyio
async def test_a_glance_is_cheap_and_slows_down_nobody_who_watches(tmp_path: Path) -> None:
    async with node(tmp_path) as made:
        await made.start(fps=15.0, source="conveyor:?seed=3")
        await made.vision.snapshot("belt")
        seen: list[int] = []
        with anyio.fail_after(5):  # at the pace of a glance it would take a quarter of a minute
            async with aclosing(made.vision.frames("belt")) as frames:
                async for frame in frames:
                    seen.append(frame.sequence)
                    if len(seen) == 5:
                        await made.vision.snapshot("belt")
                    if len(seen) == 15:
                        break


@pytest.mark.anyio
async def test_pictures_are_detected_annotated_and_refused(tmp_path: Path) -> None:
    async with node(tmp_path) as made:
        data, picture = belt()
        found = await made.vision.detect("conveyor-detr", data, None, annotate=True)
        assert (found.width, found.height) == (640, 360)
        assert found.jpeg is not None
        assert len(found.detections) >= 2
        for each in found.detections:
            assert each["label"] in ("parcel", "bottle", "ball")
            assert 0.5 <= each["score"] <= 1
            x0, y0, x1, y1 = each["box"]
            assert 0 <= x0 < x1 <= 640
            assert 0 <= y0 < y1 <= 360
        assert decode_picture(found.jpeg).shape == picture.shape
        many = await made.vision.detect("conveyor-detr", data, 0.05, annotate=False)
        assert many.jpeg is None
        assert len(many.detections) >= len(found.detections)
        for model, image, threshold, reason in (
            ("conveyor-detr", b"no picture", None, "invalid"),
            ("conveyor-detr", data, 7.0, "invalid"),
            ("no-such-model", data, None, "unknown_model"),
        ):
            with pytest.raises(WorkerRefused) as refused:
                await made.vision.detect(model, image, threshold, annotate=False)
            assert refused.value.reason == reason


@pytest.mark.anyio
async def test_requests_that_cannot_be_are_refused_and_the_cameras_go_on(tmp_path: Path) -> None:
    async with node(tmp_path) as made:
        await made.start(fps=5.0)
        for settings, words in (
            ({"source": "ftp://admin:s3cret@host/x"}, "none of"),
            ({"fps": 0}, "fps"),
            ({"line": {"start": [0.5, 0.5], "end": [0.5, 0.5]}}, "no length"),
            ({"colour": "red"}, "unknown field"),
            ({"model": "no-such-model"}, "not open"),
        ):
            with pytest.raises(WorkerRefused, match=words) as refused:
                await made.start(**settings)
            assert "s3cret" not in str(refused.value)
        with pytest.raises(WorkerRefused, match="stop them first"):
            await made.worker.call(CloseModel(0, "conveyor-detr"))
        await made.open()  # again: the pipelines go over to the new engine
        with pytest.raises(WorkerRefused, match="no pipeline"):
            await made.vision.snapshot("nowhere")
        await made.until(lambda: made.vision.cameras() and made.vision.cameras()[0]["processed"] > 2, "frames")


@pytest.mark.anyio
async def test_a_video_file_of_people_is_followed(test_data: Path, tmp_path: Path) -> None:
    described = json.loads((test_data / "data/coco64/instances.json").read_text())["categories"]
    labels = [each["name"] for each in sorted(described, key=lambda each: int(each["id"]))]
    manifest = {
        "name": "deimv2-atto", "task": "detection", "format": "onnx", "licence": "Apache-2.0", "summary": "",
        "files": {"model": {"source": "mirror:deimv2_hgnetv2_atto_coco_raw.onnx"}},
        "detection": {"height": 320, "width": 320, "labels": labels},
    }  # fmt: skip
    (tmp_path / "belt").mkdir()
    async with node(tmp_path / "belt") as made:
        folder = tmp_path / "atto"
        folder.mkdir()
        (folder / "model.onnx").symlink_to(test_data / "models/deimv2_hgnetv2_atto_coco_raw.onnx")
        await made.worker.call(OpenModel(0, "deimv2-atto", manifest, str(folder), {"threads": 1}))
        source = f"file:{test_data}/data/people.mp4?pace=none"
        await made.start(source=source, model="deimv2-atto", labels=["person"], threshold=0.4)
        await made.until(lambda: any(event.kind == "object" for event in made.events), "a person")
        (new,) = [event for event in made.events if event.kind == "object"][:1]
        assert new.data["label"] == "person"
        jpeg = await made.vision.snapshot("belt")
        assert decode_picture(io.BytesIO(jpeg).getvalue()).shape == (432, 768, 3)


def test_a_silent_worker_is_no_picture_of_health(monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.worker_protocol import Status

    node_vision = Node(Path()).vision
    node_vision.on_report(Status({}, {"belt": {"state": "streaming", "fps": 10.0}}, 0.0, 0), b"")
    assert node_vision.cameras() == [{"id": "belt", "state": "streaming", "fps": 10.0}]
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + 6)
    assert node_vision.cameras()[0]["state"] == "unknown"
