"""What every decoder of the bench is opened for and gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Prompt = Sequence[int]


@dataclass(frozen=True)
class Room:
    """What a decoder is opened for. `path`: an engine folder for ours, the GGUF for the others."""

    path: Path
    threads: int
    slots: int
    context_tokens: int


@dataclass(frozen=True)
class Timing:
    """`tokens` were read or written in `seconds`; `first` are those of the first sequence."""

    tokens: int
    seconds: float
    first: tuple[int, ...] = ()

    @property
    def per_s(self) -> float:
        return self.tokens / self.seconds


class Decoder(Protocol):
    def prefill(self, prompt: Prompt) -> Timing: ...

    def decode(self, prompts: Sequence[Prompt], steps: int) -> Timing: ...
