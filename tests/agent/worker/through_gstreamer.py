"""Run by test_rtsp.py, with the system's GStreamer bindings on the path: look through GStreamer at a source, and say what came.

`python -m tests.agent.worker.through_gstreamer SOURCE DECODER` prints, a JSON value a line: the ages and the shape of sixty frames where
there are any, then the camera's message when it is lost. `… SOURCE clip FOLDER` records a clip instead, as test_rtsp.py wants it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from agent.worker.camera import Camera
from agent.worker.sources import parse_source
from tests.agent.worker.clock_picture import age_s

SYSTEM_PACKAGES = "/usr/lib/python3/dist-packages"


def main(text: str, decoder: str) -> None:
    sys.path.append(SYSTEM_PACKAGES)
    camera = Camera(parse_source(text, 640, 360, 20.0, "gstreamer" if decoder == "gstreamer" else "ffmpeg"), lambda: None, 2.0)
    ages: list[float] = []
    camera.start()
    try:
        end_s = time.monotonic() + 30
        while camera.state(time.monotonic()).name != "backing_off" and time.monotonic() < end_s:
            frame = camera.slot.take()
            if frame is None:
                time.sleep(0.005)
                continue
            ages.append(age_s(frame.load()))
            if len(ages) == 60:
                say([ages, list(frame.load().shape)])
        say(camera.state(time.monotonic()).message)
    finally:
        camera.stop()
        camera.join()


def record(url: str, folder: Path) -> None:
    from tests.agent.worker.test_rtsp import recorded  # which imports this module
    from tests.agent.worker.test_vision import Bench, closing

    sys.path.append(SYSTEM_PACKAGES)
    with tempfile.TemporaryDirectory() as model, closing(Bench(Path(model))) as bench:
        recorded(bench, url, folder, decoder="gstreamer")


def say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[2] == "clip":
        record(sys.argv[1], Path(sys.argv[3]))
    else:
        main(sys.argv[1], sys.argv[2])
