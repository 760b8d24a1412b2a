"""Low-rank adapters (LoRA) in the layout of the library peft: read, merged into weights, or stacked to be chosen per row.

`adapter_config.json` and `adapter_model.safetensors`: https://huggingface.co/docs/peft/developer_guides/checkpoint. A projection computes
y = W x + scale · B (A x), scale = alpha / r, or alpha / sqrt(r) with `use_rslora` (https://arxiv.org/abs/2106.09685, 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.decoder import Decoder
from converters.decoder_from_transformers import weight_name
from converters.decoder_source import DecoderSource, Matrix, interleaved_order
from converters.errors import ConversionError, unsupported
from converters.json_object import JsonObject, read_json_object
from converters.quantised_blocks import Float
from converters.safetensors_file import read_safetensors

MAX_RANK = 1024
_ROLE = re.compile(r"^(adapter|merged)\.([a-z0-9][a-z0-9_-]{0,62})\.(config|weights)$")
_KEY = re.compile(r"^base_model\.model\.(model\.layers\.\d+\.[a-z_.]+)\.lora_([AB])\.weight$")


@dataclass(frozen=True)
class AdapterFiles:
    name: str
    config: Path
    weights: Path


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


def adapter_files(sources: Mapping[str, Path]) -> tuple[list[AdapterFiles], list[AdapterFiles]]:
    """Adapters among a model's files by role: those to keep apart (`adapter.NAME.config`, `adapter.NAME.weights`), and those to merge
    (`merged.NAME.config`, `merged.NAME.weights`), each in the order of their names. Raises ConversionError."""
    found: dict[tuple[str, str], dict[str, Path]] = {}
    for role, path in sources.items():
        match = _ROLE.match(role)
        if match is not None:
            found.setdefault((match[1], match[2]), {})[match[3]] = path
    kinds: dict[str, list[AdapterFiles]] = {"adapter": [], "merged": []}
    for (kind, name), parts in sorted(found.items()):
        if set(parts) != {"config", "weights"}:
            raise ConversionError(f"adapter {name!r} needs the two files {kind}.{name}.config and {kind}.{name}.weights", "bad_request")
        kinds[kind].append(AdapterFiles(name, parts["config"], parts["weights"]))
    return kinds["adapter"], kinds["merged"]


def read_adapter(files: AdapterFiles, source: DecoderSource) -> Adapter:
    """An adapter to the weights of `source`. Raises ConversionError for one that does not fit, or has parts that are not implemented."""
    config = read_json_object(files.config, f"adapter_config.json of {files.name}")
    rank, scale = _scale(config)
    halves: dict[str, dict[str, Float]] = {}
    for key, tensor in read_safetensors(files.weights, f"adapter_model.safetensors of {files.name}").items():
        match = _KEY.match(key)
        name = "" if match is None else weight_name(f"{match[1]}.weight")
        if match is None or name not in source.tensors or not name.startswith("blk.") or "norm" in name:
            raise unsupported(f"adapter {files.name}: tensor {key!r} changes what cannot be changed here; q, k, v, o, gate, up, down can")
        halves.setdefault(name, {})[match[2]] = tensor.float32()
    changes = {}
    for name, parts in halves.items():
        rows, columns = source.shape(name)
        if {part: half.shape for part, half in parts.items()} != {"A": (rank, columns), "B": (rows, rank)}:
            raise ConversionError(
                f"adapter {files.name} does not fit {name} of {rows} x {columns} with rank {rank}; it is of another model"
            )
        if not all(np.isfinite(half).all() for half in parts.values()):
            raise ConversionError(f"adapter {files.name}: {name} has values that are no numbers; the file is damaged")
        changes[name] = LowRank(parts["A"], parts["B"] * np.float32(scale))
    if not changes:
        raise ConversionError(f"adapter {files.name} changes nothing; fetch it again")
    return Adapter(files.name, changes)


def _scale(config: JsonObject) -> tuple[int, float]:
    """Rank, and what B A x is multiplied with."""
    if config.text("peft_type").upper() != "LORA":
        raise unsupported(f"{config.name}: {config.text('peft_type')!r} is no LoRA, the only kind that is implemented")
    for field, plain in (("use_dora", False), ("fan_in_fan_out", False), ("lora_bias", False), ("bias", "none")):
        if config.values.get(field) not in (None, plain):
            raise unsupported(f"{config.name}: {field} {config.values[field]!r} is not implemented")
    for field in ("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "trainable_token_indices"):
        if config.values.get(field):
            raise unsupported(f"{config.name}: {field} is not implemented; merge this adapter where it was trained")
    rank, alpha = config.integer("r"), config.number("lora_alpha")
    if not 1 <= rank <= MAX_RANK:
        raise ConversionError(f"{config.name}: r is {rank}, outside 1..{MAX_RANK}; the file is damaged")
    return rank, alpha / (math.sqrt(rank) if config.flag("use_rslora", False) else rank)


@dataclass(frozen=True)
class MergedSource:
    """Weights with an adapter added to them; those that it changes are float32, whatever they were stored as."""

    source: DecoderSource
    decoder: Decoder
    adapter: Adapter

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self.source.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def format(self, name: str) -> str:
        return "F32" if name in self.adapter.changes else self.source.format(name)

    def float32(self, name: str) -> Float:
        weight = self.source.float32(name)
        change = self.adapter.changes.get(name)
        if change is None:
            return weight
        added = change.up @ change.down
        part = name.split(".")[-2]
        if self.decoder.has_interleaved_rows and part in ("attn_q", "attn_k"):
            order = interleaved_order(len(added), self.decoder.heads if part == "attn_q" else self.decoder.kv_heads)
            added[order] = added.copy()
        merged: Float = weight + added
        return merged

    def matrix(self, name: str) -> Matrix:
        return self.float32(name) if name in self.adapter.changes else self.source.matrix(name)
