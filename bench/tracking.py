"""CPU time of the tracker, and of all that follows from it, for a frame with 5, 20 and 80 objects: `python -m bench.tracking`.

Objects move about a 1080p picture and bounce off its edges; boxes carry 2 % noise, 5 % are missed, each has one of three labels. CPU time
of this process, median over rounds of 100 frames, so that neighbours on the machine matter little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from agent.worker.areas import Zone
from agent.worker.lines import Line
from agent.worker.meaning import Meaning, Moment
from agent.worker.settings import PipelineSettings
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


def tracking() -> Callable[[list[Detection], float], object]:
    return Tracker(TrackerSettings()).update


def meaning() -> Callable[[list[Detection], float], object]:
    """With four zones and two lines, without the JPEGs of snapshots."""
    quarters = [(x, y) for x in (0.0, 0.5) for y in (0.0, 0.5)]
    zones = tuple(Zone(f"{x} {y}", ((x, y), (x + 0.5, y), (x + 0.5, y + 0.5), (x, y + 0.5)), loitering_s=5) for x, y in quarters)
    whole = Meaning(PipelineSettings("bench", "conveyor:", "none", lines=(Line(), Line(name="other", start=(0, 0))), zones=zones), 0.5)
    return lambda found, at_s: whole.see(found, Moment(at_s, at_s, 1920, 1080, bytes))


def cpu_ms(start: Callable[[], Callable[[list[Detection], float], object]], film: list[list[Detection]], rounds: int) -> float:
    """Median milliseconds of CPU for one frame."""
    times = []
    for _ in range(rounds + 1):
        see = start()
        began = time.process_time()
        for number, found in enumerate(film):
            see(found, number / FPS)
        times.append((time.process_time() - began) * 1000 / len(film))
    return float(np.median(times[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    films = {f"{objects} objects": scene(objects, 100) for objects in (5, 20, 80)}
    for name, start in (("tracker", tracking), ("tracker, zones, lines, events", meaning)):
        print(name, json.dumps({objects: round(cpu_ms(start, film, rounds), 3) for objects, film in films.items()}))


if __name__ == "__main__":
    main()
