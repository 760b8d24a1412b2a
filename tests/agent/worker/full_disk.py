"""Run by test_recording.py in a mount namespace of its own: a disk that fills up in mid-clip, and has room again. Argument: a folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import numpy as np

from agent.worker.masks import Masks
from agent.worker.recording import Recorder
from agent.worker.settings import Recording

DISK_MB = 96


def main(folder: Path) -> None:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)], check=True)
    recorder = Recorder(Recording(True, pre_s=0.2, post_s=0.1), folder / "door", Masks(), 20.0, has_packets=False)
    recorder.start()
    rng = np.random.default_rng(1)

    def feed(until: Callable[[], bool]) -> None:
        end_s = time.monotonic() + 20
        while not until():
            if time.monotonic() > end_s:
                raise TimeoutError(json.dumps(recorder.status()))
            recorder.picture(rng.integers(0, 256, (120, 160, 3), np.uint8), time.monotonic())
            time.sleep(0.02)

    began_s = time.monotonic()
    feed(lambda: time.monotonic() - began_s > 0.5)
    first = recorder.begin("1-aaaaaa", "person", 0.3)
    feed(lambda: recorder.status()["clips"] == 1)
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 20)):
                pass
        except OSError:
            pass
    feed(lambda: recorder.status()["state"] == "stopped")
    stopped = recorder.status()["message"]
    recorder.end("1-aaaaaa", 0.0)
    refused = recorder.begin("2-bbbbbb", "person", 0.3)
    filler.unlink()
    feed(lambda: recorder.status()["state"] == "ready")
    second = recorder.begin("3-cccccc", "person", 0.3)
    feed(lambda: recorder.status()["clips"] == 1)
    recorder.end("3-cccccc", 0.0)
    feed(lambda: recorder.status()["written"] >= 1 and recorder.status()["clips"] == 0)
    recorder.close()
    recorder.join()
    news = [(event.data["state"], event.data["message"]) for event in recorder.news()]
    files = sorted(file.name for file in (folder / "door").iterdir())
    sys.stdout.write(json.dumps({"begun": [first, refused, second], "news": news, "stopped": stopped, "files": files}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
