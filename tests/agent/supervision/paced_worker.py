"""A real worker process whose engine takes each step only when a test lets it: `steps` in the model's folder gets the tokens of each step
as it begins, `permits` says how many may end; without that file all may."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from agent.worker.text import TextService  # noqa: E402
from models.engines import EngineOptions, SlotTokens  # noqa: E402
from models.engines.fake import FakeGenerationEngine  # noqa: E402


class PacedEngine(FakeGenerationEngine):
    def __init__(self, folder: Path, options: EngineOptions) -> None:
        super().__init__(97, options.slots, options.context_tokens)
        self._folder = folder
        self._begun = 0

    def step(self, batch: Sequence[SlotTokens]) -> np.ndarray:
        self._begun += 1
        with (self._folder / "steps").open("a") as file:
            file.write(f"{sum(len(item.tokens) for item in batch)}\n")
        while self._begun > self._permits():
            time.sleep(0.002)
        return super().step(batch)

    def _permits(self) -> int:
        try:
            return int((self._folder / "permits").read_text() or 0)
        except FileNotFoundError:
            return sys.maxsize


class PacedText(TextService):
    def __init__(self, emit: Any, wake: Any) -> None:
        super().__init__(emit, wake, PacedEngine)


if __name__ == "__main__":
    from agent.worker.__main__ import main

    sys.exit(main(sys.argv[1:], {"text": (PacedText.__module__, "PacedText")}))
