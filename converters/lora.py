"""Low-rank adapters (LoRA) in the layout of the library peft: read, merged into weights, or stacked to be chosen per row.

`adapter_config.json` and `adapter_model.safetensors`: https://huggingface.co/docs/peft/developer_guides/checkpoint. A projection computes
y = W x + scale · B (A x), scale = alpha / r, or alpha / sqrt(r) with `use_rslora` (https://arxiv.org/abs/2106.09685, 2312.03732).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.quantised_blocks import Float


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one weight: `up @ down`, the scale within `up`; rows of `up` in the published order.

    down float32 [rank, columns], up float32 [rows, rank]
    """

    down: Float
    up: Float


@dataclass(frozen=True)
class Adapter:
    """`changes` by the weight's name in a DecoderSource."""

    name: str
    changes: Mapping[str, LowRank]


@dataclass(frozen=True)
class Stacked:
    """Changes of several adapters to one projection. `ranks`: how many rows of `down` belong to each adapter."""

    down: Float
    up: Float
    ranks: tuple[int, ...]

    def choice(self) -> NDArray[np.bool_]:
        """[1 + adapters, all ranks]: which rows belong to the adapter; none to number 0, the model itself."""
        owners = np.repeat(np.arange(len(self.ranks)), self.ranks)
        choice: NDArray[np.bool_] = owners[None] + 1 == np.arange(len(self.ranks) + 1)[:, None]
        return choice


def stacked(adapters: Sequence[Adapter], widths: Mapping[str, int]) -> Stacked | None:
    """The changes to weights that lie side by side, each so many rows wide; None where no adapter changes them."""
    starts = dict(zip(widths, np.cumsum([0, *widths.values()]), strict=False))
    total = sum(widths.values())
    downs: list[Float] = []
    ups: list[Float] = []
    ranks = [0] * len(adapters)
    for index, adapter in enumerate(adapters):
        for name, start in starts.items():
            change = adapter.changes.get(name)
            if change is None:
                continue
            up = np.zeros((total, change.up.shape[1]), np.float32)
            up[start : start + widths[name]] = change.up
            downs.append(change.down)
            ups.append(up)
            ranks[index] += change.up.shape[1]
    if not downs:
        return None
    return Stacked(np.concatenate(downs), np.concatenate(ups, axis=1), tuple(ranks))
