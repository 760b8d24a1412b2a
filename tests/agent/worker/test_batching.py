"""Frames of several cameras in one run: which ones go together, how long it waits for more, how old they are when it begins."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from agent.worker.batching import Candidate, is_worth_waiting, oldest_alike, window_s
from agent.worker.camera import Frame, Slot
from agent.worker.sources import OPENERS, Grab, Source
from agent.worker.vision import VisionService, _Opened
from agent.worker_protocol import Report, StartPipeline
from models import manifest
from models.engines import TensorSpec
from models.pictures import Picture
from models.tasks.detection import Detector

WIDE, TALL = ("m", 48, 64), ("m", 64, 48)


def test_the_oldest_is_served_with_those_of_its_kind_and_nobody_else() -> None:
    waiting = [Candidate("a", WIDE, 3.0), Candidate("b", TALL, 1.0), Candidate("c", WIDE, 2.0), Candidate("d", TALL, 4.0)]
    assert [each.name for each in oldest_alike([*waiting, Candidate("e", TALL, None)])] == ["b", "d"]
    assert [each.name for each in oldest_alike(waiting[::2])] == ["c", "a"]
    assert [each.name for each in oldest_alike([Candidate("a", WIDE, 1.0), Candidate("b", ("n", 48, 64), 0.0)])] == ["b"]
    assert oldest_alike([Candidate("e", TALL, None)]) == []


def test_a_run_waits_only_for_what_comes_in_time_fits_and_has_room() -> None:
    batch = [Candidate("a", WIDE, 1.0)]

    def waits(*others: Candidate, most: int = 2) -> bool:
        return is_worth_waiting(batch, [*batch, *others], most, until_s=5.0)

    assert waits(Candidate("b", WIDE, None, 4.9))
    assert not waits(Candidate("b", WIDE, None, 5.1))
    assert not waits(Candidate("b", WIDE, None, None))
    assert not waits(Candidate("b", TALL, None, 4.9))
    assert not waits(Candidate("b", WIDE, None, 4.9), most=1)
    assert [window_s(execution_s) for execution_s in (0.0, 0.1, 2.0)] == pytest.approx([0.0, 0.02, 0.03])


def test_a_slot_says_when_its_next_frame_is_expected() -> None:
    slot = Slot()
    assert slot.next_s(0.0) is None
    for number in range(6):
        slot.put(Frame(lambda: np.zeros((1, 1, 3), np.uint8), number, number / 10, number / 10))
    assert slot.next_s(0.55) == pytest.approx(0.6)
    assert slot.next_s(0.65) == pytest.approx(0.6)
    assert slot.next_s(0.75) is None, "it did not come"


class SlowEngine:
    """Takes `execution_s` for a run of any size, and reads from the pictures how old they were when it began."""

    inputs: tuple[TensorSpec, ...] = (TensorSpec("pixel_values", "float32", (-1, 3, -1, -1)),)
    outputs: tuple[TensorSpec, ...] = (TensorSpec("logits", "float32", (-1, 1, 1)), TensorSpec("pred_boxes", "float32", (-1, 1, 4)))
    provider = "fake"

    def __init__(self, execution_s: float) -> None:
        self.execution_s = execution_s
        self.tickets = itertools.count()  # 256 of them are told apart, which is seconds of all cameras
        self.captured_s: dict[int, float] = {}
        self.runs: list[tuple[tuple[int, ...], float]] = []

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        now_s, pixels = time.monotonic(), inputs["pixel_values"]
        tickets = [round(float(value) * 255) for value in pixels[:, 0, 0, 0]]
        self.runs.append((pixels.shape, max(now_s - self.captured_s[ticket] for ticket in tickets)))
        time.sleep(self.execution_s)
        return {"logits": np.full((len(pixels), 1, 1), -9, np.float32), "pred_boxes": np.full((len(pixels), 1, 4), 0.5, np.float32)}

    def close(self) -> None:
        pass

    def opened(self, batch_max: int) -> _Opened:
        facts = manifest.Detection(48, 64, ("thing",), resize="shortest_edge")
        model = manifest.DetectionManifest("m", "", "", "onnx", {}, build=manifest.Build(batch_max=batch_max), detection=facts)
        return _Opened(self, Detector(self, model))

    def capture(self, source: Source, stop: threading.Event, *_: Any) -> Iterator[Grab]:
        """Live pictures of one grey each, by which it is known when they were taken."""
        while not stop.wait(1 / source.fps):
            ticket = next(self.tickets) % 256
            self.captured_s[ticket] = time.monotonic()
            picture: Picture = np.full((source.height, source.width, 3), ticket, np.uint8)
            yield Grab(lambda picture=picture: picture)  # type: ignore[misc]  # mypy has no type for a default in a lambda


def watched(engine: SlowEngine, batch_max: int, seconds: float, cameras: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is said of each camera after the service was stepped for so long, as the loop does it."""
    bell = threading.Event()

    def emit(report: Report, payload: bytes = b"") -> None:
        pass

    service = VisionService(emit, bell.set)
    service._models["m"] = engine.opened(batch_max)
    try:
        for name, settings in cameras.items():
            service.handle(StartPipeline(1, name, {"source": "csi:0", "model": "m", "fps": 10.0, **settings}), b"")
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            if not service.step():
                bell.wait(0.2)
                bell.clear()
        return service.status()[1]
    finally:
        service.close()


def test_cameras_of_two_shapes_share_a_slow_detector_and_no_run_begins_with_what_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SlowEngine(execution_s=0.4)
    monkeypatch.setitem(OPENERS, "csi", engine.capture)
    wide, tall = {"width": 64, "height": 48, "stale_s": 0.25}, {"width": 48, "height": 64, "stale_s": 0.25}
    pipelines = watched(engine, 3, 4.0, {f"cam{number}": (wide, tall)[number % 2] for number in range(8)})
    rows = [shape[0] for shape, _ in engine.runs]
    assert {shape[2:] for shape, _ in engine.runs} == {(48, 64), (64, 48)}
    assert max(rows) == 3
    assert sum(rows) >= 2 * len(rows), f"few batches: {rows}"
    # A second run in the same step would begin with frames that are older by an execution; what is over the budget is scaling them.
    assert max(age_s for _, age_s in engine.runs) <= 0.25 + 0.1
    looks = {name: each["processed"] for name, each in pipelines.items()}
    assert min(looks.values()) >= 1, f"starved: {looks}"
    assert max(looks.values()) <= min(looks.values()) + 3, f"not fair: {looks}"


def test_a_frame_that_is_stale_for_one_camera_is_fresh_enough_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of frames that come twice a second most are older than a fifth of a second when a slow detector gets to them."""
    engine = SlowEngine(execution_s=0.45)
    monkeypatch.setitem(OPENERS, "csi", engine.capture)
    slow = {"width": 64, "height": 48, "fps": 2.0}
    pipelines = watched(engine, 1, 2.5, {"quick": {**slow, "stale_s": 0.05}, "calm": {**slow, "stale_s": 5.0}})
    assert pipelines["quick"]["skipped"]["stale"] >= 1
    assert pipelines["calm"]["skipped"]["stale"] == 0
    assert pipelines["calm"]["processed"] >= 1


def test_frames_that_come_one_after_another_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cameras a few milliseconds apart, and a detector with time to spare: without the wait each would have a run of its own."""
    engine = SlowEngine(execution_s=0.3)
    monkeypatch.setitem(OPENERS, "csi", engine.capture)
    small = {"width": 64, "height": 48, "fps": 2.0}
    watched(engine, 2, 3.0, {"left": small, "right": small})
    rows = [shape[0] for shape, _ in engine.runs]
    assert rows.count(2) > len(rows) / 2, f"few batches: {rows}"
