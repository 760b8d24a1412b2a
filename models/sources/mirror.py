"""`HOTSPARE_MIRROR`: a folder or base URL that holds the files of a fleet without internet; layout: see the package."""

from __future__ import annotations

import urllib.parse
from pathlib import Path
from typing import Callable, Iterator, List, Mapping, Tuple

from models.engine_record import is_inside
from models.manifest import ModelFile
from models.sources import local
from models.sources.errors import SourceError
from models.sources.http import Request, download, plain_url
from models.sources.work import Work

TRIES = 3


def place(environment: Mapping[str, str]) -> str:
    return environment.get("HOTSPARE_MIRROR", "").rstrip("/")


def names_of(file: ModelFile, sha256: str) -> List[str]:
    """The names under which a mirror may hold a file, best first. `sha256` is empty when nothing is known of its content."""
    scheme, _, location = file.source.partition(":")
    location = location.lstrip("/").partition("?")[0]
    if not is_inside(location):
        raise SourceError(f"{file.source} leaves its folder")
    names = [sha256] if sha256 else []
    names.append(location if scheme == "mirror" else f"{scheme}/{location}")
    if sha256:
        names.append(location.rpartition("/")[2])
    return list(dict.fromkeys(names))


def attempts(file: ModelFile, sha256: str, environment: Mapping[str, str]) -> Iterator[Tuple[str, Callable[[Work], Path]]]:
    """One attempt for each name, or none without a mirror."""
    mirror = place(environment)
    if not mirror:
        return
    for name in names_of(file, sha256):
        if mirror.startswith(("https://", "http://")):
            request = Request(f"{mirror}/{urllib.parse.quote(name)}", file.size_bytes, tries=TRIES)
            yield plain_url(request.url), _from_url(request)
        else:
            path = Path(mirror).absolute() / name
            yield str(path), _from_folder(path)


def _from_url(request: Request) -> Callable[[Work], Path]:
    def attempt(work: Work) -> Path:
        download(request, work.partial, work.require_space, work.progress)
        return work.partial

    return attempt


def _from_folder(path: Path) -> Callable[[Work], Path]:
    return lambda work: local.copy(path, work)
