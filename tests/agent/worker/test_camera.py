"""Cameras on real sources: files that end, servers that vanish, fall silent or refuse; nothing secret is said, the newest frame wins."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.worker.camera import Backoff, Camera, Frame, Slot
from agent.worker.patience import Patience
from agent.worker.sources import parse_source

DEADLINE_S = 10.0


def until(condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.005)


def number_of(picture: np.ndarray) -> int:
    return round(float(picture.mean()) / 12)


def video(path: Path, frames: int = 20) -> Path:
    """160x120, 20 frames a second; frame n is grey of brightness 12 n."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size, stream.bit_rate = 160, 120, "yuv420p", 1, 4_000_000
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((120, 160, 3), 12 * number % 256, np.uint8), format="bgr24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def camera_of(text: str, stall_s: float = 1.0, backoff: Backoff | None = None) -> Camera:
    return Camera(parse_source(text, 320, 180, 10.0), lambda: None, stall_s, backoff, lambda: 1.0)


@contextmanager
def running(camera: Camera) -> Iterator[Camera]:
    camera.start()
    try:
        yield camera
    finally:
        camera.stop()
        camera.join()
        assert not camera.is_alive


class MotionJpeg:
    """A network camera on loopback: sends `frames` JPEGs a connection, `pause_s` apart, then hangs up or falls silent."""

    def __init__(self, frames: int, falls_silent: bool, pause_s: float = 0.05) -> None:
        self._pause_s = pause_s
        self.connections = 0
        self._frames = frames
        self._falls_silent = falls_silent
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://admin:s3cret@127.0.0.1:{self._listener.getsockname()[1]}/video?token=hush"
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        self._listener.settimeout(0.1)
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except socket.timeout:  # a TimeoutError since Python 3.10
                continue
            self.connections += 1
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n"
        with connection:
            try:
                connection.sendall(head)
                for number in range(self._frames):
                    jpeg = bytes(cv2.imencode(".jpg", np.full((120, 160, 3), 8 * (number % 30), np.uint8))[1])
                    part = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n".encode()
                    connection.sendall(part + jpeg + b"\r\n")
                    if self._stop.wait(self._pause_s):
                        return
                if self._falls_silent:
                    self._stop.wait(DEADLINE_S)
            except OSError:  # the camera's side closed first
                return

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()


@contextmanager
def motion_jpeg(frames: int, falls_silent: bool, pause_s: float = 0.05) -> Iterator[MotionJpeg]:
    server = MotionJpeg(frames, falls_silent, pause_s)
    try:
        yield server
    finally:
        server.close()


def test_a_file_without_pace_gives_every_frame_in_order_and_ends(tmp_path: Path) -> None:
    path = video(tmp_path / "v.mp4")
    with running(camera_of(f"file:{path}?pace=none")) as camera:
        seen = []
        while camera.state(time.monotonic()).name != "ended" or camera.slot.has_frame:
            until(lambda: camera.slot.has_frame or camera.state(0).name == "ended", "a frame or the end")
            frame = camera.slot.take()
            if frame is not None:
                seen.append((frame.sequence, round(frame.at_s, 3), number_of(frame.load())))
                time.sleep(0.002 * (len(seen) % 3))
        assert seen == [(n + 1, round(n / 20, 3), n) for n in range(20)]
        assert (camera.slot.busy, camera.slot.not_due) == (0, 0)


def test_the_newest_frame_wins_under_a_slow_consumer(tmp_path: Path) -> None:
    path = video(tmp_path / "v.mp4", frames=30)
    with running(camera_of(f"file:{path}?loop=yes")) as camera:
        until(lambda: camera.slot.has_frame, "the first frame")
        ages, sequences = [], []
        for _ in range(4):
            time.sleep(0.3)  # a detector at work
            frame = camera.slot.take()
            assert frame is not None
            ages.append(time.monotonic() - frame.captured_s)
            sequences.append(frame.sequence)
        assert max(ages) < 0.15  # one period of 50 ms, and what a busy machine adds
        assert all(later - earlier >= 4 for earlier, later in zip(sequences, sequences[1:]))
        assert camera.slot.busy >= sequences[-1] - len(sequences) - 1


def test_a_repeated_file_goes_on_in_time(tmp_path: Path) -> None:
    path = video(tmp_path / "v.mp4", frames=5)
    with running(camera_of(f"file:{path}?loop=yes&pace=none")) as camera:
        times = []
        for _ in range(12):
            until(lambda: camera.slot.has_frame, "a frame")
            frame = camera.slot.take()
            assert frame is not None
            times.append(frame.at_s)
        assert all(later > earlier for earlier, later in zip(times, times[1:]))


def test_a_camera_that_refuses_is_tried_again_and_nothing_secret_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    caplog.set_level(logging.INFO)
    url = f"rtsp://admin:s3cr@t#1@127.0.0.1:{port}/live?password=hush"
    with running(camera_of(url, backoff=Backoff(first_s=0.05, limit_s=0.2))) as camera:
        until(lambda: camera.state(time.monotonic()).failures >= 4, "four failures")
        state = camera.state(time.monotonic())
        assert state.name in ("backing_off", "connecting")
        assert state.connections == 0
        assert "127.0.0.1" in state.message
        said = state.message + camera.source.label + caplog.text
    assert not re.search("s3cr|hush|admin", said)


def test_a_camera_that_hangs_up_is_found_again() -> None:
    backoff = Backoff(first_s=0.05, limit_s=0.1)
    with motion_jpeg(frames=12, falls_silent=False) as server, running(camera_of(server.url, backoff=backoff)) as camera:
        until(lambda: camera.state(time.monotonic()).connections >= 2, "a second connection")
        assert "s3cret" not in camera.state(time.monotonic()).message
        frame = None
        while frame is None:
            frame = camera.slot.take()
        assert frame.load().shape == (120, 160, 3)
    assert server.connections >= 2


def test_a_camera_that_falls_silent_is_given_up_at_the_deadline() -> None:
    with motion_jpeg(frames=10, falls_silent=True) as server:
        camera = camera_of(server.url, stall_s=0.5, backoff=Backoff(first_s=30.0))
        with running(camera):
            until(lambda: camera.state(time.monotonic()).name == "streaming", "streaming")
            began_s = time.monotonic()
            until(lambda: camera.state(time.monotonic()).name == "stalled", "stalled")
            until(lambda: camera.state(time.monotonic()).name == "backing_off", "given up")
            assert time.monotonic() - began_s < 5
            assert re.search("gave nothing|ended", camera.state(time.monotonic()).message)


def test_a_camera_slower_than_the_limit_is_learnt_instead_of_connected_for_ever() -> None:
    with motion_jpeg(frames=1000, falls_silent=False, pause_s=0.5) as server:
        backoff = Backoff(first_s=0.05, limit_s=0.1)
        with running(camera_of(server.url, stall_s=0.2, backoff=backoff)) as camera:
            until(lambda: camera._patience.limit_s >= 2, "its period is known")
            connections, sequence = server.connections, camera._sequence
            until(lambda: camera._sequence >= sequence + 6, "it goes on")
            assert server.connections == connections <= 6


def test_patience_follows_the_cameras_period_and_not_a_frame_that_was_late() -> None:
    patience = Patience(3.0)
    patience.connect()
    for at_s in (0, 0.1, 0.2, 2.9, 3.0, 3.1):
        patience.see(at_s)
    assert patience.limit_s == 3.0
    for attempt in range(6):  # a camera of a frame a minute
        patience.connect()
        patience.see(100.0 * attempt)
        patience.lose_to_silence()
    assert patience.limit_s == 60.0
    patience.connect()
    for at_s in (0, 4, 8, 12):
        patience.see(at_s)
    assert patience.limit_s == 20.0
    for at_s in range(13, 30):
        patience.see(at_s)
    assert patience.limit_s == 5.0
    patience.lose_to_silence()  # its period is known: it hangs
    assert patience.limit_s == 5.0


def test_stopping_does_not_wait_for_the_back_off() -> None:
    camera = camera_of("file:/does/not/exist.mp4", backoff=Backoff(first_s=60.0))
    camera.start()
    until(lambda: camera.state(time.monotonic()).name == "backing_off", "backing off")
    assert "/does/not/exist.mp4" in camera.state(time.monotonic()).message
    began_s = time.monotonic()
    camera.stop()
    camera.join()
    assert time.monotonic() - began_s < 1
    assert not camera.is_alive


def test_skipped_frames_are_counted_by_cause() -> None:
    slot = Slot()
    slot.due_s = 10.0
    for captured_s in (9.0, 9.5, 10.5, 11.0):
        slot.put(Frame(lambda: np.zeros((1, 1, 3), np.uint8), 1, captured_s, captured_s))
    assert (slot.not_due, slot.busy, slot.yielding) == (2, 1, 0)


def test_what_is_lost_while_the_device_is_needed_elsewhere_is_no_fault_of_the_detector() -> None:
    slot = Slot()
    slot.due_s = 10.0

    def put(captured_s: float) -> None:
        slot.put(Frame(lambda: np.zeros((1, 1, 3), np.uint8), 1, captured_s, captured_s))

    put(9.9)
    slot.yield_from(0.2)  # 5 of 10 a second are wanted, and none is taken
    for number in range(20):
        put(10.0 + number / 10)
    assert (slot.busy, slot.not_due, slot.yielding) == (0, 10, 10)
    slot.take()
    slot.due_s = 12.9  # one a second now, of which one is looked at
    for number in range(21, 30):
        put(10.0 + number / 10)
    assert (slot.busy, slot.not_due + slot.yielding, slot.yielding) == (0, 28, 14)
    slot.yield_from(None)
    put(13.0)
    put(13.1)
    assert slot.busy == 2


@given(st.integers(1, 1000), st.floats(0, 1))
def test_back_off_doubles_with_full_jitter_up_to_its_limit(failures: int, share: float) -> None:
    delay_s = Backoff().delay_s(failures, share)
    assert delay_s == pytest.approx(share * 2 ** (failures - 1)) if failures <= 6 else 57 <= delay_s <= 60


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ftp://host/x", "none of"),
        ("file:relative.mp4", "absolute"),
        ("file:/x.mp4?speed=2", "no option 'speed'"),
        ("file:/x.mp4?loop=maybe", "loop='maybe'"),
        ("conveyor:?seed=x", "numbers"),
        ("conveyor:?fps=0", "fps"),
        ("v4l2:/etc/passwd", "none of"),
        ("v4l2:/dev/video0?fourcc=JPEG2", "MJPG or YUYV, not 'JPEG2'"),
        ("v4l2:/dev/video0?width=1280", "width and height, both"),
        ("v4l2:/dev/video0?fps=nan", "fps must be"),
        ("v4l2:/dev/video0?size=big", "no option 'size'"),
        ("http:/no", "none of"),
        ("csi:left", "none of"),
        ("rtsp://user:my password@host/live", "none of"),
    ],
)
def test_sources_that_cannot_be(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_source(text, 640, 360, 10.0)


@pytest.mark.parametrize("text", ["rtsps://user:s3cret@camera/live", "http://user:s3cret@camera/live", "file:/x.mp4", "conveyor:"])
def test_udp_is_for_plain_rtsp(text: str) -> None:
    with pytest.raises(ValueError, match=r"^transport: UDP is for rtsp://") as refused:
        parse_source(text, 640, 360, 10.0, transport="udp")
    assert "s3cret" not in str(refused.value)
    assert parse_source("rtsp://camera/live", 640, 360, 10.0, transport="udp").transport == "udp"
