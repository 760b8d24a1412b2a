"""What the child process is asked to build: one JSON object on its standard input."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import ConversionError
from models.manifest import Manifest, ManifestError, manifest_from_mapping
from models.sources import base_name

MAX_BYTES = 4 << 20
MAX_THREADS = 64
MODEL_ROLE = "model"
FILE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")


@dataclass(frozen=True)
class BuildOptions:
    """threads: of the runtime while verifying. nice: added to the process's niceness."""

    threads: int = 2
    nice: int = 10


@dataclass(frozen=True)
class BuildRequest:
    """`sources`: role in the manifest → fetched file."""

    manifest: Manifest
    sources: dict[str, Path]
    store: Path
    options: BuildOptions

    @property
    def model(self) -> Path:
        """The file that is converted: that of the role `model`."""
        if MODEL_ROLE not in self.sources:
            raise _bad(f"{self.manifest.name} has the files {', '.join(self.manifest.files)}; name the one to convert [files.{MODEL_ROLE}]")
        return self.sources[MODEL_ROLE]

    @property
    def companions(self) -> dict[str, Path]:
        """The other files, by the names that they have at their sources."""
        return {self._name(role): path for role, path in self.sources.items() if role != MODEL_ROLE}

    def _name(self, role: str) -> str:
        name = base_name(self.manifest.files[role])
        if not FILE_NAME.match(name):
            raise _bad(f"files.{role}: {name!r}, the last part of its source, is no plain file name")
        return name


def parse_request(text: bytes) -> BuildRequest:
    """Raises ConversionError (code `bad_request`)."""
    if len(text) > MAX_BYTES:
        raise _bad(f"the request has more than {MAX_BYTES} bytes")
    try:
        values = json.loads(text)
    except ValueError as error:
        raise _bad(f"the request is not JSON: {error}") from error
    known = {"manifest", "sources", "store", "options"}
    if not isinstance(values, dict) or set(values) - known or {"manifest", "sources", "store"} - set(values):
        raise _bad(f"the request must be an object with the fields {', '.join(sorted(known))} (options may be missing)")
    try:
        manifest = manifest_from_mapping(_table(values, "manifest"))
    except ManifestError as error:
        raise _bad(f"manifest: {error}") from error
    return BuildRequest(manifest, _sources(_table(values, "sources"), manifest), _path(values["store"], "store"), _options(values))


def _sources(values: dict[str, Any], manifest: Manifest) -> dict[str, Path]:
    if set(values) != set(manifest.files):
        raise _bad(f"sources has the roles {', '.join(sorted(values))}, the manifest {', '.join(sorted(manifest.files))}")
    sources = {role: _path(path, f"sources.{role}") for role, path in values.items()}
    for role, path in sources.items():
        if not path.is_file():
            raise _bad(f"sources.{role}: {path} is no file; fetch the model first (`hotspare models pull {manifest.name}`)")
    return sources


def _options(values: dict[str, Any]) -> BuildOptions:
    options = _table(values, "options") if "options" in values else {}
    limits = {"threads": (1, MAX_THREADS), "nice": (0, 19)}
    for name, value in options.items():
        if name not in limits or not isinstance(value, int) or isinstance(value, bool) or not limits[name][0] <= value <= limits[name][1]:
            allowed = ", ".join(f"{known} {low}..{high}" for known, (low, high) in limits.items())
            raise _bad(f"options.{name} is {value!r}; known are the integers {allowed}")
    return BuildOptions(**options)


def _table(values: dict[str, Any], name: str) -> dict[str, Any]:
    value = values[name]
    if not isinstance(value, dict):
        raise _bad(f"{name} is {type(value).__name__}, must be an object")
    return value


def _path(value: object, name: str) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise _bad(f"{name} is {value!r}, must be an absolute path")
    return Path(value)


def _bad(message: str) -> ConversionError:
    return ConversionError(message, "bad_request")
