"""GGUF files written by hand: small random decoders in every weight format."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.quantised_blocks import BLOCK_LAYOUTS

KINDS = {layout.name: kind for kind, layout in BLOCK_LAYOUTS.items()}
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, LAYERS, VOCABULARY = 256, 4, 2, 64, 256, 2, 288

# Where the float16 numbers of a block lie, and values that keep the weights near 0.05.
_HALVES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 0.01),),
    "Q4_1": ((0, 0.01), (2, -0.075)),
    "Q5_0": ((0, 0.005),),
    "Q5_1": ((0, 0.005), (2, -0.08)),
    "Q8_0": ((0, 0.0007),),
    "Q4_K": ((0, 0.0002), (2, 0.0015)),
    "Q5_K": ((0, 0.0001), (2, 0.0015)),
    "Q6_K": ((208, 0.00003),),
}


@dataclass(frozen=True)
class RawTensor:
    """`shape` outermost first; `data` in the format `kind`. `offset` overrides where the table says it lies."""

    kind: str | int
    shape: tuple[int, ...]
    data: bytes
    offset: int | None = None


def random_tensor(rng: np.random.Generator, kind: str, *shape: int) -> RawTensor:
    layout = BLOCK_LAYOUTS[KINDS[kind]]
    if layout.unpack is None:
        values = (rng.standard_normal(shape) * 0.05).astype(np.float32)
        if kind == "BF16":
            return RawTensor(kind, shape, (values.view(np.uint32) >> 16).astype("<u2").tobytes())
        return RawTensor(kind, shape, values.astype("<f2" if kind == "F16" else "<f4").tobytes())
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // layout.values, layout.bytes), dtype=np.uint8)
    for start, size in _HALVES[kind]:
        halves = (size * rng.uniform(0.5, 1.5, len(blocks))).astype("<f2")
        blocks[:, start : start + 2] = halves.view(np.uint8).reshape(-1, 2)
    return RawTensor(kind, shape, blocks.tobytes())


def ones(*shape: int) -> RawTensor:
    return RawTensor("F32", shape, np.ones(shape, "<f4").tobytes())


@dataclass(frozen=True)
class Recipe:
    """A decoder to write; `metadata` and `tensors` are added last and may replace or (with None) remove."""

    architecture: str = "llama"
    kind: str = "Q4_1"
    embedding_kind: str = "Q8_0"
    head_kind: str | None = None
    value_kind: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, RawTensor | None] = field(default_factory=dict)
    seed: int = 0


def write_decoder(path: Path, recipe: Recipe) -> Path:
    rng = np.random.default_rng(recipe.seed)
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    tensors: dict[str, RawTensor | None] = {
        "token_embd.weight": random_tensor(rng, recipe.embedding_kind, VOCABULARY, HIDDEN),
        "output_norm.weight": _norm(rng, HIDDEN),
    }
    if recipe.head_kind is not None:
        tensors["output.weight"] = random_tensor(rng, recipe.head_kind, VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for part, rows, columns in (
            ("attn_q", queries, HIDDEN),
            ("attn_k", keys, HIDDEN),
            ("attn_v", keys, HIDDEN),
            ("attn_output", HIDDEN, queries),
            ("ffn_gate", FEED_FORWARD, HIDDEN),
            ("ffn_up", FEED_FORWARD, HIDDEN),
            ("ffn_down", HIDDEN, FEED_FORWARD),
        ):
            kind = recipe.value_kind if recipe.value_kind is not None and part == "attn_v" else recipe.kind
            tensors[f"{block}{part}.weight"] = random_tensor(rng, kind, rows, columns)
        tensors[f"{block}attn_norm.weight"] = _norm(rng, HIDDEN)
        tensors[f"{block}ffn_norm.weight"] = _norm(rng, HIDDEN)
        if recipe.architecture == "qwen2":
            for part, width in (("q", queries), ("k", keys), ("v", keys)):
                tensors[f"{block}attn_{part}.bias"] = random_tensor(rng, "F32", width)
        if recipe.architecture == "qwen3":
            tensors[f"{block}attn_q_norm.weight"] = _norm(rng, HEAD_DIM)
            tensors[f"{block}attn_k_norm.weight"] = _norm(rng, HEAD_DIM)
    tensors.update(recipe.tensors)
    name = recipe.architecture
    metadata: dict[str, Any] = {
        "general.architecture": name,
        f"{name}.block_count": LAYERS,
        f"{name}.context_length": 128,
        f"{name}.embedding_length": HIDDEN,
        f"{name}.feed_forward_length": FEED_FORWARD,
        f"{name}.attention.head_count": HEADS,
        f"{name}.attention.head_count_kv": KV_HEADS,
        f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{name}.rope.freq_base": 10000.0,
        **byte_vocabulary(),
        **recipe.metadata,
    }
    return write_gguf(
        path,
        {key: value for key, value in metadata.items() if value is not None},
        {key: tensor for key, tensor in tensors.items() if tensor is not None},
    )


def byte_vocabulary() -> dict[str, Any]:
    """256 bytes in GPT-2's spelling, a few merges, and ChatML marks: 288 tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + index) for index, byte in enumerate(byte for byte in range(256) if byte not in printable)}
    tokens = [spelling[byte] for byte in range(256)]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "1 2", "Ġ Ġ"]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    marks = len(tokens)
    tokens += [f"<unused{index}>" for index in range(VOCABULARY - marks)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * (marks - 3) + [3] * 3 + [5] * (VOCABULARY - marks), np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": marks - 1,
        "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, RawTensor], version: int = 3, alignment: int = 32) -> Path:
    head = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    head += [_text(key) + _value(value) for key, value in metadata.items()]
    body = b""
    for name, tensor in tensors.items():
        body += b"\0" * (-len(body) % alignment)
        kind = KINDS[tensor.kind] if isinstance(tensor.kind, str) else tensor.kind
        offset = len(body) if tensor.offset is None else tensor.offset
        shape = tensor.shape[::-1]
        head.append(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
        body += tensor.data
    header = b"".join(head)
    path.write_bytes(header + b"\0" * (-len(header) % alignment) + body)
    return path


def _norm(rng: np.random.Generator, width: int) -> RawTensor:
    return RawTensor("F32", (width,), rng.uniform(0.5, 1.5, width).astype("<f4").tobytes())


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: bool | int | float | str | list[str] | NDArray[Any]) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    kind = {np.dtype(np.int32): 5, np.dtype(np.float32): 6}[value.dtype]
    return struct.pack("<IIQ", 9, kind, len(value)) + value.tobytes()
