"""Run by test_recording.py in a mount namespace of its own: a disk that fills up in mid-clip, and has room again.

`python -m tests.agent.worker.full_disk FOLDER recorder|pipeline`: a recorder alone, or all of a worker's camera side.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np

from agent.worker.masks import Masks
from agent.worker.recording import Recorder
from agent.worker.settings import Recording
from agent.worker_protocol import CameraEvent
from tests.agent.worker.test_vision import Bench, closing

DISK_MB = 96


def mount(folder: Path) -> None:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)], check=True)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 20)):
                pass
        except OSError:
            pass
    return filler


def recorder_alone(folder: Path) -> Dict[str, Any]:
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
    filler = fill(folder)
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
    return {"begun": [first, refused, second], "news": news, "stopped": stopped, "files": files}


def whole_pipeline(folder: Path) -> Dict[str, Any]:
    wishes: Dict[str, Any] = {"enabled": True, "pre_s": 0.2, "post_s": 0.2, "max_s": 1.0}
    with tempfile.TemporaryDirectory() as model, closing(Bench(Path(model))) as bench:
        bench.start("belt", "conveyor:?seed=3", fps=8.0, record=wishes, media=str(folder / "belt"))

        def work(until: Callable[[Dict[str, Any]], bool]) -> Dict[str, Any]:
            end_s = time.monotonic() + 60
            while True:
                belt = bench.work(0.1)["belt"]
                if until(belt):
                    return belt
                if time.monotonic() > end_s:
                    raise TimeoutError(json.dumps(belt))

        def told(since: int, kind: str) -> List[Dict[str, Any]]:
            return [event.data for event in bench.reports[since:] if isinstance(event, CameraEvent) and event.kind == kind]

        work(lambda belt: bool(belt["recording"]["written"]))
        filler = fill(folder)
        full = work(lambda belt: bool(belt["recording"]["state"] == "stopped"))
        since = len(bench.reports)
        later = work(lambda belt: belt["processed"] >= full["processed"] + 16 and any(told(since, "object")))
        begun = [event for event in told(since, "object") if event["type"] == "new"]
        filler.unlink()
        work(lambda belt: bool(belt["recording"]["state"] != "stopped"))
        again = work(lambda belt: bool(belt["recording"]["written"] > later["recording"]["written"]))
        return {
            "states": [full["state"], later["state"], again["state"]],
            "while_full": [later["processed"] - full["processed"], [event["clip"] for event in begun]],
            "news": [event["state"] for event in told(0, "recording")],
        }


def main(folder: Path, what: str) -> None:
    mount(folder)
    sys.stdout.write(json.dumps({"recorder": recorder_alone, "pipeline": whole_pipeline}[what](folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
