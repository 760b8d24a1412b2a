"""What the child process is asked to build: one JSON object on its standard input."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from converters.errors import ConversionError
from models.manifest import Manifest, ManifestError, Precision, manifest_from_mapping
from models.sources import base_name

Target = Literal["onnxruntime", "native", "tensorrt", "tensorrt_rtx"]
Provider = Literal["cpu", "cuda", "tensorrt"]

MAX_BYTES = 4 << 20
MAX_THREADS = 64
MAX_TIMEOUT_S = 86_400.0
MAX_SHARE = 0.9
TARGETS: tuple[Target, ...] = ("onnxruntime", "native", "tensorrt", "tensorrt_rtx")
MODEL_ROLE = "model"
FILE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")


@dataclass(frozen=True)
class BuildOptions:
    """How to build; the manifest's [build] table answers what is left open here.

    precision          where the ladder begins (see `converters/ladder.py`); `auto`: what the manifest says
    target             the runtime that will open the engine; `native` is code compiled here, for decoders on the CPU; `tensorrt_rtx` is
                       TensorRT for RTX, whose plans no Jetson runs
    provider           of ONNX Runtime, that will serve: the gate runs on it, so what was proven is what serves
    python             the interpreter that has TensorRT, that of the worker
    calibration        folder of pictures or text file: inputs of the gate, and where int8 ranges come from; None: what the manifest says
    accept_unverified  publish what the gate refused or could not run, marked as such
    workspace_share    of the memory that is free when the build begins, for TensorRT to try kernels in
    threads            of the runtime while verifying
    nice               added to the niceness of the build and of its children
    timeout_s          the whole build; then it is ended and leaves nothing behind
    """

    precision: Precision = "auto"
    target: Target = "onnxruntime"
    provider: Provider = "cpu"
    python: Path = Path(sys.executable)
    calibration: Path | None = None
    accept_unverified: bool = False
    workspace_share: float = 0.5
    threads: int = 2
    nice: int = 10
    timeout_s: float = 7200.0


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
        return self.named(lambda role: role != MODEL_ROLE)

    def named(self, is_wanted: Callable[[str], bool] = lambda role: True) -> dict[str, Path]:
        """The files of some roles, by the names that they have at their sources."""
        return {self._name(role): path for role, path in self.sources.items() if is_wanted(role)}

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
    given = _table(values, "options") if "options" in values else {}
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name not in _OPTIONS:
            raise _bad(f"options.{name} is not known; known are {', '.join(_OPTIONS)}")
        checked[name] = _OPTIONS[name](value, f"options.{name}")
    return BuildOptions(**checked)


def _one_of(*allowed: str) -> Callable[[object, str], str]:
    def check(value: object, name: str) -> str:
        if value not in allowed:
            raise _bad(f"{name} is {value!r}, must be one of {', '.join(allowed)}")
        return str(value)

    return check


def _integer(low: int, high: int) -> Callable[[object, str], int]:
    def check(value: object, name: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _bad(f"{name} is {value!r}, must be an integer {low}..{high}")
        return value

    return check


def _seconds(value: object, name: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 <= value <= MAX_TIMEOUT_S:
        raise _bad(f"{name} is {value!r}, must be 1..{MAX_TIMEOUT_S:g} seconds")
    return float(value)


def _share(value: object, name: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= MAX_SHARE:
        raise _bad(f"{name} is {value!r}, must be above 0 and at most {MAX_SHARE}")
    return float(value)


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise _bad(f"{name} is {value!r}, must be true or false")
    return value


def _program(value: object, name: str) -> Path:
    path = _path(value, name)
    if not os.access(path, os.X_OK) or path.is_dir():
        raise _bad(f"{name}: {path} is no program; name the interpreter of the worker")
    return path


def _inputs(value: object, name: str) -> Path | None:
    if value is None:
        return None
    path = _path(value, name)
    if not path.exists():
        raise _bad(f"{name}: {path} does not exist; name a folder of pictures or a text file")
    return path


_OPTIONS: dict[str, Callable[[object, str], object]] = {
    "precision": _one_of(*get_args(Precision)),
    "target": _one_of(*TARGETS),
    "provider": _one_of(*get_args(Provider)),
    "python": _program,
    "calibration": _inputs,
    "accept_unverified": _flag,
    "workspace_share": _share,
    "threads": _integer(1, MAX_THREADS),
    "nice": _integer(0, 19),
    "timeout_s": _seconds,
}


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
