"""Pre-processing: the formula written out, letterboxes, memory that is used again, and what transformers' own processors make."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.manifest import Detection
from models.pictures import Picture
from models.scaling import Placement, Scaler, placement_of
from tests.models.processed import CASES, IMAGENET, digest, pictures

# Written by `python -m tests.converters.transformers.processors`.
PROCESSED = json.loads((Path(__file__).parent / "processors.json").read_text())
# In steps of a byte. Means over a twentieth of the picture hold channels, normalisation and places; at single points enlarged pictures are
# equal but for rounding, and shrunk ones differ: PIL antialiases up to a shrink of two too, and we do not (models/scaling.py says why).
MEANS, ENLARGED, SHRUNK = 0.75, 0.4, 3.0


def planes(facts: Detection, picture: Picture) -> np.ndarray:
    return Scaler(facts).planes([picture], [placement_of(facts, *picture.shape[:2])], 1)


def noise(height: int, width: int, seed: int = 3) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("row", PROCESSED, ids=lambda row: f"{row['picture']} {row['cases'][0]}")
def test_planes_are_those_of_transformers_processors(row: dict[str, list[int]], test_data: Path) -> None:
    picture = pictures(test_data)[str(row["picture"])]
    for name in map(str, row["cases"]):
        facts = CASES[name].facts
        found = digest(planes(facts, picture), facts)
        assert found["shape"] == row["shape"]
        grid, points = (np.abs(np.subtract(found[part], row[part])) / 10 for part in ("grid", "points"))
        is_enlarged = found["shape"][2] >= picture.shape[0] and found["shape"][3] >= picture.shape[1]
        assert grid.max() <= MEANS
        assert points.mean() <= (ENLARGED if is_enlarged else SHRUNK)


def test_every_family_is_among_them() -> None:
    assert {name for row in PROCESSED for name in row["cases"]} == set(CASES)


def test_planes_equal_the_formula_written_out() -> None:
    picture = noise(48, 64)
    facts = Detection(32, 40, ("a",), mean=IMAGENET["mean"], std=IMAGENET["std"])
    scaled = cv2.cvtColor(cv2.resize(picture, (40, 32)), cv2.COLOR_BGR2RGB).astype(np.float64) / 255
    expected = ((scaled - facts.mean) / facts.std).transpose(2, 0, 1)[None]
    found = planes(facts, picture)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(480, 640), (960, 1280), (1081, 1919), (90, 2000), (64, 64), (1, 1)])
def test_shrinking_leaves_no_pixel_out(shape: tuple[int, int]) -> None:
    """A grid of single bright pixels keeps its mean: plain bilinear would see some of them and miss the others."""
    picture = np.zeros((*shape, 3), np.uint8)
    picture[::2, ::2] = 255
    found = planes(Detection(64, 64, ("a",)), picture)
    assert found.mean() == pytest.approx(picture.mean() / 255, abs=0.02)


def test_a_letterbox_keeps_the_aspect_and_fills_with_what_is_normalised_to_nothing() -> None:
    picture = np.full((50, 100, 3), (10, 20, 200), np.uint8)
    facts = Detection(64, 64, ("a",), resize="letterbox", mean=(0.5, 0.25, 0.125), std=(0.5, 1, 1))
    place = placement_of(facts, 50, 100)
    assert (place.scaled, place.canvas, place.extent) == ((32, 64), (64, 64), (100, 100))
    scaler = Scaler(facts)
    scaler.planes([noise(64, 64)], [placement_of(facts, 64, 64)], 1)  # what it leaves behind must not shine through
    found = scaler.planes([picture], [place], 1)[0]
    np.testing.assert_allclose(found[:, 5, 5], [(200 / 255 - 0.5) / 0.5, 20 / 255 - 0.25, 10 / 255 - 0.125], atol=1e-6)
    assert (found[:, 32:] == 0).all()
    pixels = scaler.pixels([picture], [place], 1)[0]
    assert (pixels[5, 5].tolist(), pixels[40, 5].tolist()) == ([200, 20, 10], [128, 64, 32])


def test_a_batch_is_its_pictures_and_memory_is_used_again() -> None:
    facts = Detection(32, 40, ("a",))
    batch = [noise(100, 90, 1), noise(32, 40, 2), noise(20, 200, 3)]
    places = [placement_of(facts, *picture.shape[:2]) for picture in batch]
    scaler = Scaler(facts)
    together = scaler.planes(batch, places, 4)
    assert together.shape == (4, 3, 32, 40)
    for found, picture in zip(together, batch):
        np.testing.assert_array_equal(found, planes(facts, picture)[0])
    assert np.shares_memory(together, scaler.planes(batch[:2], places[:2], 2))
    pixels = scaler.pixels(batch, places, 3)
    np.testing.assert_array_equal(pixels[1], batch[1][:, :, ::-1])
    assert np.shares_memory(pixels, scaler.pixels(batch, places, 3))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    # As transformers' get_size_with_aspect_ratio for shortest_edge 800, longest_edge 1333.
    [(480, 640, (800, 1066)), (640, 480, (1066, 800)), (1080, 1920, (750, 1333)), (800, 800, (800, 800)), (100, 1000, (133, 1333))],
)
def test_shortest_edge_sizes(height: int, width: int, expected: tuple[int, int]) -> None:
    facts = Detection(800, 1333, ("a",), resize="shortest_edge")
    assert placement_of(facts, height, width) == Placement((height, width), expected, expected)
