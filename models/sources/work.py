"""One fetch from one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Mapping

from models.manifest import ModelFile
from models.sources.http import Progress
from models.store import Store


@dataclass(frozen=True)
class Work:
    """`folder` is empty and goes away after the fetch; `partial` outlives the process, for downloads that can be resumed."""

    file: ModelFile
    store: Store
    folder: Path
    environment: Mapping[str, str]
    progress: Progress

    @property
    def location(self) -> str:
        """The source without its scheme."""
        return self.file.source.partition(":")[2]

    @property
    def partial(self) -> Path:
        return self.store.partial_folder(self.file.source) / "data"

    def require_space(self, needed_bytes: int) -> None:
        self.store.require_space(needed_bytes, self.file.source)
