"""USB cameras through a VideoCapture that behaves as drivers do: refuses, hangs in a read, comes back. No such device is here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from agent.worker.camera import Backoff, Camera
from agent.worker.devices import Format
from agent.worker.sources import Source, parse_source


class Driver:
    """What all captures of one device share. `read` blocks while `is_hanging`; a hanging thread keeps the device, as drivers do."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.is_taken = self.is_unplugged = False
        self.opened = self.released = 0
        self.asked: list[tuple[int, float]] = []

    def capture(self, path: str, backend: int) -> Capture:
        assert backend == cv2.CAP_V4L2
        return Capture(self)


class Capture:
    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._is_open = not driver.is_taken
        driver.opened += self._is_open

    def isOpened(self) -> bool:  # noqa: N802  (OpenCV's name)
        return self._is_open

    def set(self, name: int, value: float) -> bool:
        self._driver.asked.append((name, value))
        return True

    def read(self) -> tuple[bool, Any]:
        time.sleep(0.02)
        assert self._driver.answers.wait(60)
        return not self._driver.is_unplugged, np.full((48, 64, 3), 7, np.uint8)

    def release(self) -> None:
        self._driver.released += self._is_open


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(cv2, "VideoCapture", made.capture)
    yield made
    made.answers.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "device"], "the end of the last thread")


@pytest.fixture
def camera(tmp_path: Path) -> Iterator[Camera]:
    device = tmp_path / "video0"
    device.touch()
    source = Source("device", str(device), f"v4l2:{device}", 30.0, format=Format("MJPG", 1280, 720, 30.0))
    made = Camera(source, lambda: None, 0.6, Backoff(0.05, 0.1), lambda: 1.0)
    yield made
    made.stop()
    if made.is_alive:
        made.join()
    assert not made.is_alive


def until(condition: Callable[[], Any], what: str) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s, f"not within 20 s: {what}"
        time.sleep(0.005)


def is_in(camera: Camera, name: str) -> Callable[[], bool]:
    return lambda: camera.state(time.monotonic()).name == name


def test_the_format_is_asked_for_before_the_first_picture_its_fourcc_first(driver: Driver, camera: Camera) -> None:
    camera.start()
    until(lambda: camera.slot.has_frame, "a frame")
    frame = camera.slot.take()
    assert frame is not None
    assert frame.load().shape == (48, 64, 3)
    assert driver.asked == [
        (cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG")),
        (cv2.CAP_PROP_FRAME_WIDTH, 1280),
        (cv2.CAP_PROP_FRAME_HEIGHT, 720),
        (cv2.CAP_PROP_FPS, 30.0),
        (cv2.CAP_PROP_BUFFERSIZE, 1),
    ]
    parsed = parse_source("v4l2:/dev/video0?fourcc=YUYV&fps=5", 640, 360, 10.0)
    assert (parsed.address, parsed.format) == ("/dev/video0", Format("YUYV", 0, 0, 5.0))


def test_a_driver_that_hangs_is_seen_as_a_stall_and_left_and_asked_again_once_it_has_let_go(driver: Driver, camera: Camera) -> None:
    camera.start()
    until(is_in(camera, "streaming"), "streaming")
    driver.answers.clear()
    until(is_in(camera, "stalled"), "a stall")
    until(lambda: "gave no picture for 0.6 s" in camera.state(time.monotonic()).message, "the reason")
    until(
        lambda: "held by another camera of this node, or by a driver that hangs" in camera.state(time.monotonic()).message, "who holds it"
    )
    assert len([thread for thread in threading.enumerate() if thread.name == "device"]) == 1, "a thread for each try hangs"
    assert driver.opened == 1
    driver.answers.set()
    until(is_in(camera, "streaming"), "streaming again")
    assert (driver.opened, driver.released) == (2, 1)


def test_a_camera_ends_at_once_while_its_driver_hangs(driver: Driver, camera: Camera) -> None:
    camera.start()
    until(is_in(camera, "streaming"), "streaming")
    driver.answers.clear()
    camera.stop()
    until(lambda: not camera.is_alive, "the camera's end")
    assert driver.released == 0, "its driver still hangs"


def test_an_absent_a_taken_and_an_unplugged_device_are_told_in_words(driver: Driver, camera: Camera) -> None:
    device = Path(camera.source.address)
    device.unlink()
    camera.start()

    def says(words: str) -> Callable[[], bool]:
        return lambda: words in camera.state(time.monotonic()).message

    until(says("is the camera plugged in?"), "that it is absent")
    driver.is_taken = True
    device.touch()
    until(says("is it taken by another program"), "that it is taken")
    driver.is_taken = False
    until(is_in(camera, "streaming"), "streaming")
    driver.is_unplugged = True
    until(says("gives no pictures any more"), "that it is gone")
    driver.is_unplugged = False
    until(is_in(camera, "streaming"), "streaming again")
    assert driver.released == driver.opened - 1
