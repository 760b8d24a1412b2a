"""Which pictures or texts a result depends on, in one word."""

from __future__ import annotations

import hashlib
from pathlib import Path

from converters.calibration import INPUTS as CALIBRATING
from converters.gate_inputs import INPUTS as PROVING
from converters.gate_inputs import picture_paths, spread
from models.durable import sha256_of


def calibration_digest(path: Path) -> str:
    """Of a file its sha256; of a folder the sha256 over the names of its pictures and the contents of those that are looked at."""
    if path.is_file():
        return sha256_of(path)[:16]
    digest = hashlib.sha256()
    pictures = picture_paths(path)
    read = {*spread(pictures, 2 * CALIBRATING), *spread(pictures, PROVING)}
    for picture in pictures:
        content = sha256_of(picture) if picture in read else ""
        digest.update(f"{picture.relative_to(path).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()[:16]
