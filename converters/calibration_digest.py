"""Which pictures or texts a result depends on, in one word."""

from __future__ import annotations

import hashlib
from pathlib import Path

from models.durable import sha256_of


def calibration_digest(path: Path) -> str:
    """Of a file its sha256; of a folder the sha256 over the names and sizes of its files: reading gigabytes at each build is too dear."""
    if path.is_file():
        return sha256_of(path)[:16]
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]
