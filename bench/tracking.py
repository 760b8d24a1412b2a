"""CPU time of the tracker for a frame with 5, 20 and 80 objects: `python -m bench.tracking`.

Objects move about a 1080p picture and bounce off its edges; boxes carry 2 % noise, 5 % are missed, each has one of three labels. CPU time
of this process, median over rounds of 100 frames, so that neighbours on the machine matter little.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from agent.worker.tracker import Tracker, TrackerSettings
from models.tasks.detection import Detection

LABELS = ("person", "car", "dog")
FPS = 10.0


def scene(objects: int, frames: int, seed: int = 1) -> list[list[Detection]]:
    rng = np.random.default_rng(seed)
    places, speeds = rng.uniform((0, 0), (1920, 1080), (objects, 2)), rng.normal(0, 80, (objects, 2))
    sizes = rng.uniform((40, 60), (90, 160), (objects, 2))
    film = []
    for _ in range(frames):
        places = places + speeds / FPS
        for axis, limit in enumerate((1920, 1080)):
            speeds[:, axis] *= np.where((places[:, axis] < 0) | (places[:, axis] > limit), -1, 1)
        corners = np.concatenate([places - sizes / 2, places + sizes / 2], axis=1) + rng.normal(0, 1, (objects, 4)) * 0.02 * sizes.mean()
        scores, seen = rng.uniform(0.3, 0.95, objects), rng.random(objects) > 0.05
        found = [Detection(LABELS[k % 3], float(scores[k]), *map(float, corners[k])) for k in range(objects) if seen[k]]
        film.append(found)
    return film


def cpu_ms(film: list[list[Detection]], rounds: int) -> float:
    """Median milliseconds of CPU for one frame."""
    times = []
    for _ in range(rounds + 1):
        tracker = Tracker(TrackerSettings())
        began = time.process_time()
        for number, found in enumerate(film):
            tracker.update(found, number / FPS)
        times.append((time.process_time() - began) * 1000 / len(film))
    return float(np.median(times[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(json.dumps({f"{objects} objects": round(cpu_ms(scene(objects, 100), rounds), 3) for objects in (5, 20, 80)}))


if __name__ == "__main__":
    main()
