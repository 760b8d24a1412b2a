"""`hotspare detect` as it is typed: a fresh state folder, a mirror, real pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

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
        (["LICENSE", "--threshold", "2"], 2, "between 0 and 1"),
        (["LICENSE", "--out", "boxes.gif"], 2, "name it .jpg"),
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
