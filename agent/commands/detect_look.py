"""Looking at files one after the other, with words or JSON about each: the work of `hotspare detect`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from agent.commands.detect_files import DetectError, Empty, Given, Targets, given_files
from agent.worker.film import Film, FilmError, FilmFrame, FilmWriter
from agent.worker.tracker import Track, Tracker, TrackerSettings
from models.durable import write_atomically
from models.engines import Engine, EngineOptions, open_engine
from models.manifest import DetectionManifest
from models.pictures import MAX_BYTES, Picture, PictureError, decode_picture, draw_detections, encode_jpeg
from models.tasks.detection import Detection, Detector

QUALITY = 92
INTERRUPTED = 130
# As for cameras: tracks are carried over frames in which they are seen less surely.
UNSURE = 0.4


def look_at_all(arguments: argparse.Namespace, model: Callable[[], tuple[DetectionManifest, Path]], threads: int) -> int:
    """`model` is asked for with the first file that can be read. Returns the exit status; raises what makes going on senseless."""
    files = list(given_files(arguments.inputs))
    if arguments.out and (len(files) != 1 or isinstance(files[0], Empty)):
        raise DetectError(f"--out names one file, and there are {len(files)} to look at; name a folder with --save")
    look = Look(arguments, model, [each.path for each in files], threads)
    try:
        with look.progress:
            all_files = look.progress.add_task("files", total=len(files))
            for given in files:
                look.file(given)
                look.progress.advance(all_files)
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted: {look.done} of {len(files)} files were looked at to their end\n")
        return INTERRUPTED
    finally:
        look.close()
    if look.failed and len(files) > 1:
        sys.stderr.write(f"{look.failed} of {len(files)} could not be looked at\n")
    return 1 if look.failed else 0


class Look:
    def __init__(
        self, arguments: argparse.Namespace, model: Callable[[], tuple[DetectionManifest, Path]], files: Sequence[Path], threads: int
    ) -> None:
        self.done = 0
        self.failed = 0
        errors, is_alone = Console(stderr=True), len(files) == 1
        # Without a terminal there is nobody to show it to; and what is printed may only pass through it where both are one terminal.
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=errors, transient=True,
            disable=(is_alone and not _is_long(files)) or not errors.is_terminal, redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip
        self._arguments = arguments
        self._model = model
        self._threads = threads
        self._is_alone = is_alone
        self._targets = Targets(arguments.save, files) if arguments.save else None
        self._engine: Engine | None = None
        self._opened: Detector | None = None
        self._console = Console(highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def file(self, given: Given | Empty) -> None:
        """One file; what is wrong with it alone is said in one line of standard error."""
        try:
            if isinstance(given, Empty):
                raise PictureError("no picture and no film lies in this folder")
            if given.is_film:
                self._film(given)
            else:
                self._picture(given)
            self.done += 1
        except (PictureError, FilmError) as error:
            self._fail(given.path, str(error))
        except BrokenPipeError:
            raise
        except OSError as error:
            self._fail(Path(error.filename or given.path), error.strerror or str(error))

    def _fail(self, path: Path, reason: str) -> None:
        self.failed += 1
        sys.stderr.write(f"error: {path}: {reason}\n")

    @property
    def _detector(self) -> Detector:
        if self._opened is None:
            manifest, folder = self._model()
            self._engine = open_engine(folder, EngineOptions(threads=self._threads))
            self._opened = Detector(self._engine, manifest)
        return self._opened

    def _target(self, given: Given) -> Path | None:
        path: Path | None = self._targets.path_for(given) if self._targets else self._arguments.out
        if path is None:
            return None
        if given.is_film != (path.suffix.lower() == ".mp4"):
            raise DetectError(f"--out {path} does not fit {given.path}: a picture is drawn as .jpg, a film as .mp4")
        if path.resolve() == given.path.resolve():
            raise DetectError(f"--out {path} is the file that is looked at; name another")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _picture(self, given: Given) -> None:
        with given.path.open("rb") as stream:
            picture = decode_picture(stream.read(MAX_BYTES + 1))
        detector, target = self._detector, self._target(given)
        began_s = time.monotonic()
        found = detector.detect(picture, self._arguments.threshold)
        latency_ms = (time.monotonic() - began_s) * 1000
        if target is not None:
            write_atomically(target, encode_jpeg(draw_detections(picture, found), QUALITY))
        facts = facts_of(detector.name, given.path, picture, latency_ms)
        if self._arguments.json:
            self._print_json({**facts, "detections": [mapping_of(each) for each in found]})
        elif self._is_alone:
            self._print_table(detector.name, picture, found, latency_ms, target)
        else:
            counts = Counter(each.label for each in found)
            self._print(f"{given.path}: {_words(counts)}, {latency_ms:.0f} ms{_arrow(target)}")

    def _film(self, given: Given) -> None:
        threshold = self._arguments.threshold
        with Film(given.path, self._arguments.every, self._arguments.fps) as film:
            detector, target = self._detector, self._target(given)
            threshold = detector.facts.threshold if threshold is None else threshold
            fps = min(film.fps / self._arguments.every, self._arguments.fps or film.fps) or 1.0
            tracker = Tracker(TrackerSettings(sure=threshold, forget_s=max(1.0, 3 / fps)))
            writer: AbstractContextManager[FilmWriter | None] = FilmWriter(target, fps) if target else nullcontext()
            task = self.progress.add_task(given.path.name, total=film.frames or None)
            seen: dict[int, str] = {}
            looks, began_s = 0, time.monotonic()
            try:
                with writer as drawn:
                    for frame in film:
                        looks += 1
                        tracks = self._frame(given, detector, tracker, frame, threshold)
                        seen.update((each.track, each.label) for each in tracks)
                        if drawn is not None:
                            drawn.write(draw_detections(frame.picture, tracks), frame.at_s)
                        self.progress.update(task, completed=frame.number + 1)
            finally:
                self._film_ended(given, task, looks, seen, began_s, target)

    def _frame(self, given: Given, detector: Detector, tracker: Tracker, frame: FilmFrame, threshold: float) -> Sequence[Track]:
        began_s = time.monotonic()
        found = detector.detect(frame.picture, threshold * UNSURE)
        tracks = [each for each in tracker.update(found, frame.at_s).tracks if each.is_seen and each.is_confirmed]
        facts = facts_of(detector.name, given.path, frame.picture, (time.monotonic() - began_s) * 1000)
        if self._arguments.json:
            at = {"frame": frame.number, "at_s": round(frame.at_s, 3)}
            self._print_json({**facts, **at, "detections": [{**mapping_of(each), "track": each.track} for each in tracks]})
        return tracks

    def _film_ended(self, given: Given, task: TaskID, looks: int, seen: dict[int, str], began_s: float, target: Path | None) -> None:
        self.progress.remove_task(task)
        if not self._arguments.json and looks:
            speed = looks / max(1e-6, time.monotonic() - began_s)
            frames = f"{looks} frame{'s' * (looks != 1)} at {speed:.1f} a second"
            self._print(f"{given.path}: {frames}, {_words(Counter(seen.values()))}{_arrow(target)}")

    def _print_json(self, values: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(values, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def _print(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def _print_table(self, model: str, picture: Picture, found: Sequence[Detection], latency_ms: float, target: Path | None) -> None:
        height, width = picture.shape[:2]
        table = Table(
            "object", "score", "left", "top", "right", "bottom", title=f"{model}, {width}x{height}, {latency_ms:.0f} ms", box=None
        )
        for column in table.columns[1:]:
            column.justify = "right"
        for each in found:
            table.add_row(each.label, f"{each.score:.1%}", *(f"{value:.0f}" for value in (each.x0, each.y0, each.x1, each.y1)))
        self._console.print(table if found else f"{model} sees nothing it knows; try a lower --threshold")
        if target:
            self._console.print(f"boxes drawn in {target}", markup=False)


def facts_of(model: str, path: Path, picture: Picture, latency_ms: float) -> dict[str, Any]:
    return {"file": str(path), "model": model, "width": picture.shape[1], "height": picture.shape[0], "latency_ms": round(latency_ms, 1)}


def mapping_of(found: Detection | Track) -> dict[str, Any]:
    box = [round(value, 1) for value in (found.x0, found.y0, found.x1, found.y1)]
    return {"label": found.label, "score": round(found.score, 4), "box": box}


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {label}" for label, count in counts.most_common()) or "nothing it knows"


def _arrow(target: Path | None) -> str:
    return f" → {target}" if target else ""


def _is_long(files: Sequence[Path]) -> bool:
    return any(Given(path, path).is_film for path in files)
