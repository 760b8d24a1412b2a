"""Pictures of a V4L2 device through OpenCV, whose reads have no deadline: a driver that hangs keeps a thread, not the camera."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, Optional

if TYPE_CHECKING:  # the daemon reads sources too, and has no use for OpenCV
    from models.pictures import Picture

SLICE_S = 0.2
GIVE_UP_S = 1.0


class DeviceError(RuntimeError):
    """A device is not there, is taken, gave up or hangs."""


@dataclass(frozen=True)
class Format:
    """What a device is asked for, as far as it is told: a FOURCC such as MJPG, which most need for large pictures at full rate."""

    fourcc: str = ""
    width: int = 0
    height: int = 0
    fps: float = 0.0


# Who captures from a device: its driver may have kept the thread for good, and a second one would hang beside it.
_held: Dict[str, threading.Thread] = {}


def device_pictures(path: str, wanted: Format, stop: threading.Event, open_s: float, stall_s: float) -> Iterator[Picture]:
    """The newest picture whenever there is one. Raises DeviceError, for a hanging driver after `open_s`, or `stall_s` without a picture."""
    _check(path)
    capture = _Capture(path, wanted)
    began_s, patience_s = time.monotonic(), open_s
    try:
        while not stop.is_set():
            picture = capture.newest(SLICE_S)
            if picture is not None:
                yield picture
                began_s, patience_s = time.monotonic(), stall_s
            elif time.monotonic() - began_s > patience_s:
                raise DeviceError(f"{path} gave no picture for {patience_s:g} s")
    finally:
        capture.give_up()


def _check(path: str) -> None:
    if not Path(path).exists():
        raise DeviceError(f"there is no {path}; is the camera plugged in? `ls /dev/video*` shows what there is")
    if not os.access(path, os.R_OK | os.W_OK):
        raise DeviceError(f"{path} is not this user's to read; make it a member of the group video")
    held = _held.get(path)
    if held is not None and held.is_alive():
        raise DeviceError(f"{path} is held by another camera of this node, or by a driver that hangs; unplugging the device frees it")


class _Capture:
    """One opened device and its thread. The thread is a daemon, for it may hang for ever and must not keep the process from ending."""

    def __init__(self, path: str, wanted: Format) -> None:
        self._path = path
        self._wanted = wanted
        self._changed = threading.Condition()
        self._picture: Optional[Picture] = None
        self._problem = ""
        self._is_given_up = False
        self._thread = _held[path] = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def newest(self, seconds: float) -> Optional[Picture]:
        """None: none came in time. Raises DeviceError."""
        with self._changed:
            self._changed.wait_for(lambda: self._picture is not None or self._problem, seconds)
            picture, self._picture = self._picture, None
            if picture is None and self._problem:
                raise DeviceError(self._problem)
            return picture

    def give_up(self) -> None:
        """Let the device go; a thread that hangs does so when its driver lets it."""
        self._is_given_up = True
        self._thread.join(GIVE_UP_S)

    def _run(self) -> None:
        try:
            self._read()
        except Exception as error:  # noqa: BLE001  # whatever OpenCV says of a device is told as the camera's state
            self._fail(f"{self._path}: {error}")

    def _read(self) -> None:
        import cv2  # only where a device is used: a build without V4L2 need not fail elsewhere

        capture: Any = cv2.VideoCapture(self._path, cv2.CAP_V4L2)
        try:
            if not capture.isOpened():
                self._fail(
                    f"{self._path} cannot be opened; is it taken by another program (`fuser -v {self._path}`), or no capture device?"
                )
                return
            for name, value in _properties(cv2, self._wanted).items():
                capture.set(name, value)
            while not self._is_given_up:
                done, picture = capture.read()
                if not done:
                    self._fail(f"{self._path} gives no pictures any more; was it unplugged, or is it taken by another program?")
                    return
                with self._changed:
                    self._picture = picture
                    self._changed.notify()
        finally:
            capture.release()

    def _fail(self, problem: str) -> None:
        with self._changed:
            self._problem = problem
            self._changed.notify()


def _properties(cv2: Any, wanted: Format) -> Dict[int, float]:
    """In the order in which drivers want them: what sizes and rates there are depends on the FOURCC."""
    asked = {
        cv2.CAP_PROP_FOURCC: cv2.VideoWriter_fourcc(*wanted.fourcc) if wanted.fourcc else 0,
        cv2.CAP_PROP_FRAME_WIDTH: wanted.width,
        cv2.CAP_PROP_FRAME_HEIGHT: wanted.height,
        cv2.CAP_PROP_FPS: wanted.fps,
        cv2.CAP_PROP_BUFFERSIZE: 1,
    }
    return {name: value for name, value in asked.items() if value}
