"""What a build needs of the way from one kind of source to an engine: a line makes attempts, the build decides among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from converters.decoder_graph import Progress
from converters.ladder import Place, Step
from converters.request import BuildRequest
from converters.verdict import Comparison, WorstTensor


@dataclass(frozen=True)
class Job:
    """`scratch`: an own folder that goes when the build ends. `timing_cache`: what earlier TensorRT builds have measured."""

    request: BuildRequest
    place: Place
    scratch: Path
    timing_cache: Path
    workspace_bytes: int


class Line(Protocol):
    """Bound to one job. Methods raise ConversionError; `compare` EngineError too."""

    def convert(self, step: Step, folder: Path, progress: Progress) -> Mapping[str, Any]:
        """Write the engine's files into the empty `folder`; returns notes for the record."""
        ...

    def compare(self, step: Step, folder: Path, progress: Progress) -> Comparison:
        """The engine that `convert` wrote against the reference."""
        ...

    def worst(self, step: Step) -> WorstTensor | None:
        """Where the last attempt leaves the reference, as far as that can be told."""
        ...


@dataclass(frozen=True)
class Kind:
    """`converters`: names and versions of all that shapes a result, by runtime kind; part of the engine key. `copies`: how many times
    the size of its sources a build takes of memory."""

    open: Callable[[Job], Line]
    converters: Callable[[Place], str]
    copies: float
