"""Which files `hotspare detect` looks at, and where what it draws goes. Touches names and folders only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
FILMS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts"})


class DetectError(Exception):
    """The command cannot do what it was asked; the message says why and what to do."""


@dataclass(frozen=True)
class Given:
    """A file to look at; `name` is its path below the folder that was named, or its own name."""

    path: Path
    name: Path

    @property
    def is_film(self) -> bool:
        return self.path.suffix.lower() in FILMS


@dataclass(frozen=True)
class Empty:
    """A folder in which nothing is to be looked at."""

    path: Path


def given_files(named: Sequence[Path]) -> Iterator[Given | Empty]:
    """Files as they were named; of folders, and of folders in them, what has the suffix of a picture or a film, in order of their names.
    Each once. What is hidden is left out."""
    seen: set[Path] = set()
    for path in named:
        if not path.is_dir():
            found = [Given(path, Path(path.name))]
        else:
            below = sorted(each for each in path.rglob("*") if each.suffix.lower() in PICTURES | FILMS and each.is_file())
            names = [(each, each.relative_to(path)) for each in below]
            found = [Given(each, name) for each, name in names if not any(part.startswith(".") for part in name.parts)]
            if not found:
                yield Empty(path)
        for each in found:
            if each.path.resolve() not in seen:
                seen.add(each.path.resolve())
                yield each


class Targets:
    """Names below `folder` for what is drawn: pictures as JPEG, films as MP4, never twice the same and never one of the inputs."""

    def __init__(self, folder: Path, inputs: Sequence[Path] = ()) -> None:
        self._folder = folder
        self._inputs = {path.resolve() for path in inputs}
        self._taken: set[Path] = set()

    def path_for(self, given: Given) -> Path:
        suffix = ".mp4" if given.is_film else ".jpg"
        is_alike = given.name.suffix.lower() == suffix or (suffix == ".jpg" and given.name.suffix.lower() == ".jpeg")
        wanted = self._folder / (given.name.with_suffix(suffix) if is_alike else given.name.with_name(given.name.name + suffix))
        path, number = wanted, 1
        while path in self._taken or path.resolve() in self._inputs:
            number += 1
            path = wanted.with_name(f"{wanted.stem}-{number}{suffix}")
        self._taken.add(path)
        return path
