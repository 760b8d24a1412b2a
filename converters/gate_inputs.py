"""What goes through reference and engine: the operator's own pictures or texts, made-up ones up to sixteen, always the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from converters.errors import ConversionError
from converters.request import BuildRequest

INPUTS = 16
PICTURE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp"))
MAX_TEXT_BYTES = 4 << 20
MAX_TEXT_CHARACTERS = 2000

SENTENCES = (
    "What is the weather like in Lisbon on 24 December?",
    "Transfer 250 euros from my savings to the joint account.",
    "The parcel stopped on the belt; the sensor at gate 3 reports a jam.",
    "Wie hoch ist der Eiffelturm?",
    "ok",
    "A keeper's day began at dusk: he trimmed the wick, wound the clockwork that turned the lens, and noted wind and passing ships.",
    "ERROR 503: upstream timed out (110: Connection timed out) while reading response header",
    "会议改到星期五下午三点。",
    "I have rarely been so bored; the second half is worse than the first.",
    "A small film with a large heart, and not one wasted minute.",
    "Set an alarm for twenty past six and play the radio in the kitchen.",
    "def area(radius):\n    return 3.14159 * radius ** 2",
    "El tren de las nueve sale con veinte minutos de retraso.",
    "Why?",
    "Two bottles, one ball and seven parcels passed the line between 14:05 and 14:06; one parcel was counted twice and corrected by hand.",
    "please cancel my subscription and tell me what the last invoice was for",
    "The committee shall publish its findings within ninety days, unless a majority of its members votes for an extension.",
)

log = logging.getLogger(__name__)

Item = TypeVar("Item")


def calibration_of(request: BuildRequest) -> Path | None:
    """The request's own, else the manifest's. Raises ConversionError (code `bad_request`) for a path that is not whole or leads nowhere."""
    if request.options.calibration is not None or not request.manifest.build.calibration:
        return request.options.calibration
    path = Path(request.manifest.build.calibration)
    if not path.is_absolute() or not path.exists():
        raise ConversionError(
            f"build.calibration of {request.manifest.name} is {str(path)!r}; "
            "write the absolute path of a folder of pictures or of a text file",
            "bad_request",
        )
    return path


def texts_of(calibration: Path | None, count: int = INPUTS) -> list[str]:
    """Lines of a text file, spread over all of it; an empty list without one. Raises ConversionError (code `bad_request`)."""
    if calibration is None:
        return []
    if not calibration.is_file():
        raise ConversionError(f"calibration {calibration} is no file; text models take a text file, one text a line", "bad_request")
    with calibration.open("rb") as stream:
        lines = stream.read(MAX_TEXT_BYTES).decode(errors="replace").splitlines()
    texts = [line.strip()[:MAX_TEXT_CHARACTERS] for line in lines if line.strip()]
    if not texts:
        raise ConversionError(f"calibration {calibration} has no text; write one text a line", "bad_request")
    return spread(texts, count)


def pictures_of(calibration: Path | None, count: int = INPUTS) -> list[NDArray[np.uint8]]:
    """Pictures (uint8 [height, width, 3], BGR) of a folder, spread over all of it in the order of their names; an empty list without one.

    Raises ConversionError (code `bad_request`) where there is none that can be read.
    """
    if calibration is None:
        return []
    from models.pictures import PictureError, decode_picture  # brings OpenCV, which text needs not

    if not calibration.is_dir():
        raise ConversionError(f"calibration {calibration} is no folder; detectors take a folder of JPEG, PNG or WebP files", "bad_request")
    pictures: list[NDArray[np.uint8]] = []
    for path in spread(picture_paths(calibration), count):
        try:
            pictures.append(decode_picture(path.read_bytes()))
        except PictureError as error:
            log.warning("%s is left out: %s", path, error)
    if not pictures:
        raise ConversionError(
            f"calibration {calibration} holds no picture that can be read; put JPEG, PNG or WebP files there", "bad_request"
        )
    return pictures


def picture_paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())


def made_up_pictures(count: int = INPUTS, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Smooth random backgrounds with flat rectangles, and the rendered belt of the demo, in turn."""
    from models.conveyor import Conveyor

    rng = np.random.default_rng(seed)
    belt = Conveyor(seed=5 + seed)
    return [belt.frame(3.7 * index) if index % 2 else _rectangles(rng) for index in range(count)]


def topped_up(own: Sequence[Item], made_up: Sequence[Item], count: int = INPUTS) -> list[Item]:
    """One picture of a site proves little: what is missing of `count` comes from the made-up ones."""
    return [*own, *made_up[: max(0, count - len(own))]]


def _rectangles(rng: np.random.Generator) -> NDArray[np.uint8]:
    coarse = rng.integers(0, 256, (12, 16, 3))
    picture = np.kron(coarse, np.ones((40, 40, 1))).astype(np.uint8)
    for _ in range(6):
        top, left = int(rng.integers(0, 400)), int(rng.integers(0, 560))
        picture[top : top + int(rng.integers(30, 200)), left : left + int(rng.integers(30, 200))] = rng.integers(0, 256, 3)
    return picture


def spread(items: list[Item], count: int) -> list[Item]:
    return items if len(items) <= count else [items[index * len(items) // count] for index in range(count)]
