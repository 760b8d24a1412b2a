"""Clips: the camera's own packets from before to after, masked ones encoded, half ones never left, a full disk survived."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from agent.worker.areas import Mask
from agent.worker.camera import Camera
from agent.worker.clips import remove_halves
from agent.worker.gstreamer import EncodedPicture, EncodedStream
from agent.worker.masks import Masks
from agent.worker.recording import Recorder
from agent.worker.settings import Recording
from agent.worker.sources import parse_source
from agent.worker_protocol import CameraEvent
from models.pictures import Picture
from tests.agent.worker.test_masks import area
from tests.agent.worker.test_vision import Bench, closing

ROOT = Path(__file__).parents[3]
FPS = 20
BLOCK = 16


def numbered(number: int) -> Picture:
    """A frame that says its number: eight blocks, black or white, the lowest bit first."""
    picture: Picture = np.full((96, 160, 3), 90, np.uint8)
    for bit in range(8):
        picture[8:40, BLOCK * bit : BLOCK * (bit + 1)] = 255 * (number >> bit & 1)
    return picture


def number_of(picture: Picture) -> int:
    return sum(int(picture[16:32, BLOCK * bit + 4 : BLOCK * bit + 12].mean() > 127) << bit for bit in range(8))


def film(path: Path, seconds: float, frame: Callable[[int], Picture] = numbered) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "20", "preset": "veryfast", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.codec_context.gop_size = FPS // 2
        for number in range(round(seconds * FPS)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(number), format="bgr24")))
        container.mux(stream.encode(None))
    return path


def pictures(path: Path) -> list[Picture]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]


def until(condition: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, f"no {what} within {seconds} s"
        time.sleep(0.01)


@contextmanager
def recording(folder: Path, wishes: Recording, masks: Masks, has_packets: bool) -> Iterator[Recorder]:
    recorder = Recorder(wishes, folder, masks, FPS, has_packets)
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.close()
        recorder.join()
        assert not recorder.is_alive


def test_a_clip_is_the_cameras_own_packets_from_before_the_event_to_after_it(tmp_path: Path) -> None:
    source = film(tmp_path / "door.mp4", 5.0)
    camera = Camera(parse_source(f"file:{source}?loop=no", 640, 360, FPS), lambda: None)
    with recording(tmp_path / "clips", Recording(True, pre_s=0.5, post_s=0.4), Masks(), has_packets=True) as recorder:
        camera.tap = recorder.packet
        camera.start()
        try:
            until(lambda: camera.slot.has_frame, "frame")
            began_s = time.monotonic()
            until(lambda: time.monotonic() - began_s >= 2.0, "two seconds")
            assert recorder.begin("1-aaaaaa", "person", ago_s=0.6)
            assert recorder.begin("2-bbbbbb", "person", ago_s=0.5)
            until(lambda: time.monotonic() - began_s >= 2.6, "more")
            recorder.end("1-aaaaaa", ago_s=0.0)
            until(lambda: recorder.written == 1, "clip")
            assert recorder.status()["clips"] == 1
        finally:
            camera.stop()
            camera.join()
    original, clip = pictures(source), pictures(tmp_path / "clips/1-aaaaaa.mp4")
    numbers = [number_of(picture) for picture in clip]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    # 2.0 s less 0.6 less 0.5 is frame 18; the keyframe before it is 10, and threads are late at times.
    assert numbers[0] in (0, 10, 20)
    assert 2.6 * FPS + 4 <= numbers[-1] <= 3.0 * FPS + 6
    assert all((picture == original[number]).all() for picture, number in zip(clip, numbers)), "it was encoded anew"
    assert number_of(pictures(tmp_path / "clips/2-bbbbbb.mp4")[-1]) > numbers[-1]
    assert sorted(file.name for file in (tmp_path / "clips").iterdir()) == ["1-aaaaaa.mp4", "2-bbbbbb.mp4"]


@pytest.mark.parametrize(("codec", "encoder"), [("h264", "libx264"), ("hevc", "libx265")])
def test_what_gstreamer_hands_on_becomes_a_clip_from_the_first_keyframe_on(codec: str, encoder: str, tmp_path: Path) -> None:
    if encoder not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {encoder}")
    context: Any = av.CodecContext.create(encoder, "w")
    context.width, context.height, context.pix_fmt, context.time_base = 160, 96, "yuv420p", Fraction(1, FPS)
    context.gop_size, context.options = 10, {"preset": "ultrafast", "x265-params": "log-level=none"}
    frames = [av.VideoFrame.from_ndarray(numbered(number), format="bgr24") for number in range(30)]
    packets = [packet for number, frame in enumerate(frames) for packet in context.encode(stamped(frame, number))] + context.encode(None)
    stream = EncodedStream(codec)
    units = [EncodedPicture(stream, bytes(each), each.is_keyframe, each.pts * 4500, each.dts * 4500) for each in packets]
    with recording(tmp_path, Recording(True, pre_s=5.0, post_s=0.1), Masks(), has_packets=True) as recorder:
        for unit in units[3:]:  # somebody connects in mid-stream
            recorder.packet(unit)
        assert recorder.begin("1-aaaaaa", "person", 0.1)
        recorder.end("1-aaaaaa", 0.0)
        until(lambda: recorder.written == 1, "clip")
        assert recorder.copies
    assert [number_of(picture) for picture in pictures(tmp_path / "1-aaaaaa.mp4")] == list(range(10, 30))
    with av.open(str(tmp_path / "1-aaaaaa.mp4")) as container:
        assert container.streams.video[0].codec_context.name == codec
        assert container.duration / av.time_base == pytest.approx(1.0, abs=0.2)


def stamped(frame: Any, number: int) -> Any:
    frame.pts = number
    return frame


def test_a_clip_is_no_longer_than_allowed_and_only_of_labels_that_are_wanted(tmp_path: Path) -> None:
    with recording(tmp_path, Recording(True, 0.2, 0.1, 0.6, labels=("person",)), Masks(), has_packets=False) as recorder:
        assert not recorder.begin("1-aaaaaa", "dog", 0.5)

        def fed() -> bool:
            recorder.picture(numbered(7), time.monotonic())
            time.sleep(0.03)
            return recorder.written == 1

        fed()
        assert recorder.begin("2-bbbbbb", "person", 0.5)
        until(fed, "clip")
    with av.open(str(tmp_path / "2-bbbbbb.mp4")) as container:
        assert 0.3 < container.duration / av.time_base < 0.8
    assert {number_of(picture) for picture in pictures(tmp_path / "2-bbbbbb.mp4")} == {7}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with closing(Bench(tmp_path)) as made:
        yield made


def test_a_pipeline_with_masks_records_pictures_that_are_black_there(bench: Bench, tmp_path: Path) -> None:
    strip = ((0.45, 0.0), (0.55, 0.0), (0.55, 1.0), (0.45, 1.0))
    wishes: dict[str, Any] = {
        "masks": [{"name": "strip", "points": [list(point) for point in strip]}],
        "record": {"enabled": True, "pre_s": 0.5, "post_s": 0.5, "max_s": 1.5},
        "media": str(tmp_path / "clips"),
    }
    bench.start("belt", "conveyor:?seed=3&fps=30", fps=15.0, **wishes)
    bench.work(4.0)
    bench.service.close()
    events = [report.data for report, _ in bench.sent if isinstance(report, CameraEvent) and report.kind == "object"]
    named = {each["clip"] for each in events if each["clip"] is not None}
    clips = sorted((tmp_path / "clips").iterdir())
    assert clips
    assert {clip.name for clip in clips} <= named
    covered = area([Mask("strip", strip)], 360, 640)
    for clip in clips:
        for picture in pictures(clip):
            assert not picture[covered].any()
            assert picture[~covered].any()


def test_a_worker_that_is_killed_leaves_no_half_clip_behind(tmp_path: Path) -> None:
    program = (
        "import sys, time, numpy as np; from pathlib import Path\n"
        "from agent.worker.recording import Recorder; from agent.worker.masks import Masks; from agent.worker.settings import Recording\n"
        "recorder = Recorder(Recording(True), Path(sys.argv[1]), Masks(), 10.0, False); recorder.start()\n"
        "print(recorder.begin('1-aaaaaa', 'person', 0.5), flush=True)\n"
        "while True: recorder.picture(np.zeros((96, 160, 3), np.uint8), time.monotonic()); time.sleep(0.05)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        until(lambda: any(tmp_path.iterdir()), "half clip")
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    (half,) = tmp_path.iterdir()
    assert half.name.startswith(".1-aaaaaa.")
    (tmp_path / "0-aaaaaa.mp4").write_bytes(b"whole")
    remove_halves(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["0-aaaaaa.mp4"]


def on_a_full_disk(folder: Path, what: str) -> Any:
    """What full_disk.py says."""
    can_mount = shutil.which("unshare") and not subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode
    if not can_mount:
        pytest.skip("a disk of its own needs the right to mount: unshare -m")
    command = ["unshare", "-m", sys.executable, "-m", "tests.agent.worker.full_disk", str(folder / "disk"), what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_disk_that_fills_up_stops_recording_once_and_resumes_it(tmp_path: Path) -> None:
    told = on_a_full_disk(tmp_path, "recorder")
    assert told["begun"] == [True, False, True]
    assert [state for state, _ in told["news"]] == ["stopped", "resumed"]
    assert "3-cccccc.mp4" in told["files"]
    assert not [name for name in told["files"] if name.startswith(".")]
    assert told["stopped"].startswith("clips cannot be written to ")


@pytest.mark.slow
def test_a_pipeline_on_a_full_disk_stops_recording_goes_on_looking_and_records_again(tmp_path: Path) -> None:
    told = on_a_full_disk(tmp_path, "pipeline")
    assert told["states"] == ["streaming"] * 3
    looks, clips = told["while_full"]
    assert looks >= 16
    assert set(clips) <= {None}, "a clip was promised that nobody can write"
    assert told["news"] == ["stopped", "resumed"]


def test_a_folder_that_cannot_be_stops_recording_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with recording(tmp_path / "file/clips", Recording(True), Masks(), has_packets=False) as recorder:
        until(lambda: recorder.status()["state"] == "stopped", "stop")
        assert not recorder.begin("1-aaaaaa", "person", 0.5)
        assert [event.data["state"] for event in recorder.news()] == ["stopped"]
        assert recorder.news() == []
