"""A pipeline that runs is told something else: the camera stays open, who is who stays known, and nonsense changes nothing."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.worker_protocol import CameraEvent, CloseModel, Done, OpenModel, StartPipeline, StopPipeline
from models.record import RecordError
from tests.agent.worker.test_vision import MODELS, Bench, closing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOURCE = "conveyor:?seed=3&fps=30"
SQUARE = [[0.3, 0.1], [0.9, 0.1], [0.9, 0.9], [0.3, 0.9]]
BOW = [[0.1, 0.1], [0.9, 0.9], [0.9, 0.1], [0.1, 0.9]]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with closing(Bench(tmp_path)) as made:
        yield made


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with closing(Bench(tmp_path_factory.mktemp("engine"))) as made:
        made.start("belt", SOURCE, fps=30.0, zones=[{"name": "old", "points": SQUARE}])
        yield made


def reopened(bench: Bench) -> bool:
    (done,) = [report for report in bench.reports if isinstance(report, Done) and "is_reopened" in report.result][-1:]
    return bool(done.result["is_reopened"])


def ids(bench: Bench, kind: str) -> list[str]:
    objects = [report.data for report in bench.reports if isinstance(report, CameraEvent) and report.kind == "object"]
    return [each["id"] for each in objects if each["type"] == kind]


def test_what_is_meant_changes_without_the_camera(bench: Bench) -> None:
    source = "conveyor:?seed=3&fps=20"
    bench.start("belt", source, fps=15.0, line={})
    before = bench.work(2.5)["belt"]
    assert before["open_events"]
    known = set(before["open_events"])
    bench.start(
        "belt", source, fps=10.0, threshold=0.45, lines=[{"name": "end", "start": [0.9, 0], "end": [0.9, 1]}],
        zones=[{"name": "middle", "points": SQUARE, "inertia_frames": 1, "loitering_s": 0.5}, {"name": "bow", "points": BOW}],
        masks=[{"name": "edge", "points": [[0.95, 0], [1, 0], [1, 0.2]]}], record={"pre_s": 1.0},
    )  # fmt: skip
    assert not reopened(bench)
    after = bench.work(1.5)["belt"]
    assert after["connections"] == 1
    assert after["processed"] > before["processed"]
    assert list(after["lines"]) == ["end"]
    assert sum(after["zones"]["middle"].values()) > 0
    assert known & set(after["open_events"])
    assert len(set(ids(bench, "new"))) == len(ids(bench, "new"))
    bench.start("belt", "conveyor:?seed=4&fps=20", fps=10.0)
    assert reopened(bench)
    assert sorted(ids(bench, "new")) == sorted(ids(bench, "end"))


def test_another_model_looks_through_the_same_camera(bench: Bench, tmp_path: Path) -> None:
    bench.start("belt", SOURCE, fps=15.0)
    known = set(bench.work(1.5)["belt"]["open_events"])
    manifest = tomllib.loads((MODELS / "manifests/conveyor-detr.toml").read_text())
    bench.service.handle(OpenModel(5, "other", manifest, str(tmp_path), {"threads": 1}), b"")
    bench.service.handle(StartPipeline(6, "belt", {"source": SOURCE, "model": "other", "fps": 15.0}), b"")
    assert not reopened(bench)
    bench.service.handle(CloseModel(7, "conveyor-detr"), b"")
    after = bench.work(0.5)["belt"]
    assert (after["model"], after["connections"], after["state"]) == ("other", 1, "streaming")
    assert known & set(after["open_events"])


def test_a_paused_camera_is_closed_and_comes_back_as_it_was_told(bench: Bench) -> None:
    bench.start("belt", SOURCE, fps=15.0)
    assert bench.work(2.0)["belt"]["open_events"]
    camera = bench.service._pipelines["belt"].camera
    for _ in range(2):
        bench.start("belt", SOURCE, fps=15.0, enabled=False)
    camera.join()
    assert not camera.is_alive
    assert bench.work(0.3)["belt"] == {"source": SOURCE, "model": "conveyor-detr", "state": "paused", "message": ""}
    assert sorted(ids(bench, "new")) == sorted(ids(bench, "end"))
    states = [each.data["state"] for each in bench.reports if isinstance(each, CameraEvent) and each.kind == "camera"]
    assert states[-2:] == ["streaming", "paused"]
    bench.start("belt", SOURCE, fps=15.0)
    assert bench.work(1.0)["belt"]["state"] == "streaming"
    bench.start("belt", SOURCE, enabled=False)
    bench.service.handle(StopPipeline(9, "belt"), b"")
    assert bench.work(0.1) == {}


def test_what_is_too_small_or_too_unlikely_for_its_label_does_not_count(bench: Bench) -> None:
    bench.start("belt", SOURCE, fps=15.0)
    seen = bench.work(2.5)["belt"]
    sizes = [each.data for each in bench.reports if isinstance(each, CameraEvent) and each.kind == "object"]
    assert seen["objects"] and sizes
    bench.reports.clear()
    bench.start("large", SOURCE, fps=15.0, min_area=0.9)
    bench.start("sure", SOURCE, fps=15.0, thresholds={"ball": 0.999, "bottle": 0.999})
    after = bench.work(2.5)
    assert not after["large"]["objects"] and not after["large"]["open_events"]
    labels = {
        each.data["label"] for each in bench.reports if isinstance(each, CameraEvent) and each.kind == "object" and each.pipeline == "sure"
    }
    assert labels == {"parcel"}
    assert {each["label"] for each in sizes} > labels


def test_a_camera_that_cannot_be_reached_says_so_once_after_so_many_attempts(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    bench.start("gone", f"http://127.0.0.1:{port}/live", alert_failures=2)
    bench.start("quiet", f"http://127.0.0.1:{port}/live", alert_failures=0)
    deadline_s = time.monotonic() + 40
    while any(each["failures"] < 3 for each in bench.work(0.2).values()) and time.monotonic() < deadline_s:
        pass
    told = [each for each in bench.reports if isinstance(each, CameraEvent) and each.kind == "unreachable"]
    assert [each.pipeline for each in told] == ["gone"]
    assert told[0].data["failures"] >= 2 and "refused" in told[0].data["message"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"zones": [{"name": "a", "points": SQUARE}, {"name": "b", "points": SQUARE[:2]}]}, r"belt: zones\[1\]\.points: 2 points"),
        ({"zones": [{"name": "a", "points": [[0.1, 0.1], [1.2, 0.5], [0.5, 0.9]]}]}, r"zones\[0\]\.points\[1\]: \[1\.2, 0\.5\]"),
        ({"zones": [{"name": "a", "points": [[0.1, 0.1], [0.5, 0.5], [0.9, 0.9]]}]}, r"zones\[0\]\.points: .* covers less than"),
        ({"zones": [{"name": "a", "points": [[0.5, 0.5]] * 4}]}, r"zones\[0\]\.points: .* covers less than"),
        ({"zones": [{"name": "a", "points": [[0.5, 0.5]] * 33}]}, r"zones\[0\]\.points: 33 points"),
        ({"zones": [{"name": "a", "points": SQUARE}] * 2}, r"zones: the name 'a' is given twice"),
        ({"zones": [{"name": "a/b", "points": SQUARE}]}, r"zones\[0\]\.name: 'a/b'"),
        ({"zones": [{"name": "a", "points": SQUARE, "inertia_frames": 0}]}, r"zones\[0\]\.inertia_frames: 0"),
        ({"zones": [{"name": "a", "points": SQUARE, "loitering_s": {"person": "long"}}]}, r"zones\[0\]\.loitering_s\.person: 'long'"),
        ({"zones": [{"name": "a", "points": SQUARE, "loitering_s": -1}]}, r"zones\[0\]\.loitering_s: -1"),
        ({"zones": [{"name": "a", "points": [[0.1, float("nan")]] * 3}]}, r"zones\[0\]\.points\[0\]"),
        ({"zones": [{"name": "a", "points": SQUARE, "colour": "red"}]}, r"PipelineSettings\.zones\[0\]: unknown field 'colour'"),
        ({"masks": [{"name": "m", "points": [[0, 0], [0, 1]]}]}, r"masks\[0\]\.points: 2 points"),
        ({"lines": [{"start": [0.1, 0.1], "end": [0.1, 0.1]}]}, r"lines\[0\]\.end: .* no length"),
        ({"line": {}, "lines": [{}]}, r"lines: the name 'line' is given twice"),
        ({"lines": [{"start": [0.1, -0.1]}]}, r"lines\[0\]\.start: \[0\.1, -0\.1\]"),
        ({"record": {"max_s": 1.0}}, r"record\.max_s 1\.0 is less"),
        ({"fps": 0}, r"belt: fps 0"),
        ({"threshold": 1.5}, r"belt: threshold 1\.5"),
        ({"thresholds": {"ball": 0}}, r"thresholds\.ball: 0"),
        ({"min_area": 1}, r"min_area 1"),
        ({"keep_days": 0}, r"keep_days 0"),
        ({"alert_failures": -1}, r"alert_failures -1"),
        ({"media": "clips"}, r"media 'clips' is not an absolute path"),
    ],
)
def test_an_invalid_change_is_refused_whole_and_what_ran_goes_on(running: Bench, wrong: dict[str, Any], message: str) -> None:
    values = {"source": SOURCE, "model": "conveyor-detr", "fps": 5.0, **wrong}
    with pytest.raises(RecordError, match=message):
        running.service.handle(StartPipeline(9, "belt", values), b"")
    status = running.work(0.15)["belt"]
    assert (status["fps_wanted"], list(status["zones"])) == (30.0, ["old"])
    assert status["connections"] == 1
