"""`hotspare detect` as it is typed: a fresh state folder, a mirror, real pictures, films."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from agent.commands.detect_files import Given, Targets, given_files
from agent.worker.film import Film, FilmWriter
from models.conveyor import Conveyor
from models.pictures import decode_picture

ROOT = Path(__file__).parents[2]


def detect(state: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("HOTSPARE_")}
    return subprocess.run(
        [sys.executable, "-m", "agent.cli", "detect", *arguments],
        env={**own, "HOTSPARE_STATE": str(state), "HOTSPARE_SITE": str(state / "site"), "COLUMNS": "100", **environment},
        cwd=ROOT, text=True, capture_output=True, timeout=100, check=False,
    )  # fmt: skip


def femto_manifest(test_data: Path, site: Path) -> None:
    described = json.loads((test_data / "data/coco64/instances.json").read_text())["categories"]
    labels = [each["name"] for each in sorted(described, key=lambda each: int(each["id"]))]
    site.mkdir(parents=True)
    (site / "deimv2-femto.toml").write_text(
        'name = "deimv2-femto"\ntask = "detection"\nformat = "onnx"\nlicence = "Apache-2.0"\nsummary = ""\n'
        '[files.model]\nsource = "mirror:deimv2_hgnetv2_femto_coco_raw.onnx"\n'
        f"[detection]\nheight = 416\nwidth = 416\nlabels = {json.dumps(labels)}\n"
    )


def test_two_cats_with_the_model_of_the_mirror(test_data: Path, tmp_path: Path) -> None:
    femto_manifest(test_data, tmp_path / "site")
    out = tmp_path / "annotated.jpg"
    picture = str(test_data / "data/two_cats.png")
    done = detect(tmp_path, picture, "--out", str(out), "--json", HOTSPARE_MIRROR=str(test_data / "models"))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    labels = [each["label"] for each in answer["detections"]]
    assert (answer["model"], answer["width"], answer["height"]) == ("deimv2-femto", 640, 480)
    assert labels.count("cat") == 2
    assert "remote" in labels
    assert decode_picture(out.read_bytes()).shape == (480, 640, 3)
    # Once fetched and converted the mirror is not needed any more, and it is still the default.
    again = detect(tmp_path, picture, "--threshold", "0.7")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("cat") == 2
    assert "remote" not in again.stdout


def test_without_a_mirror_the_shipped_model_sees_the_belt(tmp_path: Path) -> None:
    picture = tmp_path / "belt.png"
    cv2.imwrite(str(picture), Conveyor(3).frame(5.0))
    done = detect(tmp_path, str(picture), "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["model"] == "conveyor-detr"
    truth = sorted(each.label for each in Conveyor(3).truth(5.0))
    assert sorted(each["label"] for each in answer["detections"]) == truth


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["missing.jpg"], 1, "missing.jpg: No such file"),
        (["LICENSE"], 1, "neither a JPEG nor a PNG"),
        (["systemd"], 1, "systemd: no picture and no film"),
        (["LICENSE", "--threshold", "2"], 2, "between 0 and 1"),
        (["LICENSE", "--out", "boxes.gif"], 2, "name it .jpg"),
        (["LICENSE", "Makefile", "--out", "boxes.jpg"], 1, "a folder with --save"),
        (["LICENSE", "--every", "0"], 2, "whole number from 1"),
        (["LICENSE", "--fps", "-1"], 2, "above 0"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    done = detect(tmp_path, *arguments)
    assert (done.returncode, words in done.stderr) == (status, True), done.stderr


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    picture = tmp_path / "belt.png"
    cv2.imwrite(str(picture), Conveyor(3).frame(5.0))
    done = detect(tmp_path, str(picture), "--model", "conveyor-dert")
    assert done.returncode == 1
    assert "did you mean conveyor-detr" in done.stderr


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the shipped model is built by the first test that needs it."""
    return tmp_path_factory.mktemp("state")


def write_film(path: Path, frames: int, fps: float = 10.0) -> None:
    belt = Conveyor(3, 320, 192)
    with FilmWriter(path, fps) as writer:
        for number in range(frames):
            writer.write(belt.frame(number / fps), number / fps)


def test_a_folder_is_looked_at_whatever_is_wrong_with_one_of_its_files(state: Path, tmp_path: Path) -> None:
    folder, saved = tmp_path / "pictures", tmp_path / "saved"
    (folder / "deeper").mkdir(parents=True)
    cv2.imwrite(str(folder / "a.png"), Conveyor(3).frame(5.0))
    cv2.imwrite(str(folder / "a.jpg"), Conveyor(3).frame(6.0))
    cv2.imwrite(str(folder / "deeper" / "c.webp"), Conveyor(3).frame(7.0))
    (folder / "b.jpg").write_bytes((folder / "a.jpg").read_bytes()[:200])
    (folder / ".hidden.jpg").write_text("never opened")
    (folder / "notes.txt").write_text("neither picture nor film")
    done = detect(state, str(folder), str(folder / "a.png"), "--save", str(saved), "--json")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [done.stderr.splitlines()[0], "1 of 4 could not be looked at"]
    assert done.stderr.startswith(f"error: {folder}/b.jpg: the JPEG")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["a.jpg", "a.png", "c.webp"]
    assert all(row["detections"] for row in rows)
    written = sorted(str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file())
    assert written == ["a.jpg", "a.png.jpg", "deeper/c.webp.jpg"]
    for path in written:
        assert decode_picture((saved / path).read_bytes()).shape == (360, 640, 3)
    words = detect(state, str(folder / "a.png"), str(folder / "a.jpg"))
    assert words.returncode == 0, words.stderr
    assert all(re.search(rf"^{folder}/{name}: \d ", words.stdout, re.M) for name in (r"a\.png", r"a\.jpg"))


def test_a_film_gets_tracks_and_is_drawn_with_its_times(state: Path, tmp_path: Path) -> None:
    film, out = tmp_path / "belt.mp4", tmp_path / "drawn.mp4"
    write_film(film, 40)
    done = detect(state, str(film), "--fps", "5", "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["frame"], row["at_s"]) for row in rows] == [(2 * index, pytest.approx(index / 5)) for index in range(20)]
    ways: dict[int, list[float]] = {}
    for row in rows:
        for each in row["detections"]:
            ways.setdefault(each["track"], []).append(each["box"][0])
    # What is on the belt crosses the picture in more than two seconds, always to the right.
    crossing = [way for way in ways.values() if len(way) >= 8 and way == sorted(way) and way[-1] - way[0] > 100]
    assert len(crossing) >= 2
    with Film(out) as drawn, Film(film) as plain:
        frames = list(drawn)
        originals = {frame.number: frame.picture for frame in plain}
    assert [frame.at_s for frame in frames] == pytest.approx([index / 5 for index in range(20)], abs=0.001)
    difference = [np.abs(frame.picture.astype(int) - originals[2 * frame.number]).max() for frame in frames]
    assert difference[5] > 100, "boxes are drawn"


def test_a_film_that_breaks_off_is_said_and_kept_as_far_as_it_goes(state: Path, tmp_path: Path) -> None:
    whole, cut, saved = tmp_path / "whole.mkv", tmp_path / "cut.mkv", tmp_path / "saved"
    write_film(whole, 60)
    cut.write_bytes(b"\0" * 3000)
    done = detect(state, str(cut), str(whole), "--every", "20", "--save", str(saved))
    assert done.returncode == 1
    assert "cut.mkv: it is neither MP4" in done.stderr
    assert "whole.mkv: 3 frames" in done.stdout
    assert [path.name for path in saved.iterdir()] == ["whole.mkv.mp4"]


def test_an_interrupted_film_is_whole_as_far_as_it_goes(state: Path, tmp_path: Path) -> None:
    film, saved = tmp_path / "long.mp4", tmp_path / "saved"
    write_film(film, 1500, 100.0)
    own = {name: value for name, value in os.environ.items() if not name.startswith("HOTSPARE_")}
    with subprocess.Popen(
        [sys.executable, "-m", "agent.cli", "detect", str(film), "--json", "--save", str(saved)], text=True,
        env={**own, "HOTSPARE_STATE": str(state), "HOTSPARE_SITE": str(state / "site")},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for _ in range(5):
            assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "interrupted: 0 of 1 files were looked at to their end\n"
    with Film(saved / "long.mp4") as drawn:
        count = len(list(drawn))
    assert 4 <= count < 1500
    assert abs(count - 5 - len(rest.splitlines())) <= 2  # a frame is told before it is drawn
    assert [path.name for path in saved.iterdir()] == ["long.mp4"]


def test_names_of_what_is_drawn_are_never_those_of_inputs_or_of_each_other(tmp_path: Path) -> None:
    one, other = (tmp_path / name / "a.jpg" for name in ("x", "y"))
    for path in (one, other):
        path.parent.mkdir()
        path.write_bytes(b"")
    given = [each for each in given_files([one, other, one]) if isinstance(each, Given)]
    assert [each.path for each in given] == [one, other]
    # The first would be written over itself, and the second must not take the place of that input either.
    assert [path.name for path in map(Targets(one.parent, [one, other]).path_for, given)] == ["a-2.jpg", "a-3.jpg"]
    assert [path.name for path in map(Targets(tmp_path / "z", [one, other]).path_for, given)] == ["a.jpg", "a-2.jpg"]
