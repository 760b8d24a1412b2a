"""Folders as a Hugging Face repository has them, written by hand: small random decoders and adapters to them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, LAYERS, VOCABULARY = 64, 4, 2, 16, 96, 2, 288
_KINDS = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.int64): "I64", np.dtype(np.uint16): "BF16"}


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> Path:
    """uint16 arrays are written as bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, values in tensors.items():
        data = values.tobytes()
        header[name] = {"dtype": _KINDS[values.dtype], "shape": list(values.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "sliding_window": None,
        "bos_token_id": 257,
        "eos_token_id": 258,
    }
    return {name: value for name, value in (values | changes).items() if value is not ...}


def weights(kind: str = "llama", seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

    def matrix(*shape: int) -> NDArray[np.float32]:
        return (0.15 * rng.standard_normal(shape)).astype(np.float32)

    def norm(width: int) -> NDArray[np.float32]:
        return rng.uniform(0.5, 1.5, width).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "model.norm.weight": norm(HIDDEN)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        for part, rows, columns in (
            ("self_attn.q_proj", queries, HIDDEN),
            ("self_attn.k_proj", keys, HIDDEN),
            ("self_attn.v_proj", keys, HIDDEN),
            ("self_attn.o_proj", HIDDEN, queries),
            ("mlp.gate_proj", FEED_FORWARD, HIDDEN),
            ("mlp.up_proj", FEED_FORWARD, HIDDEN),
            ("mlp.down_proj", HIDDEN, FEED_FORWARD),
        ):
            tensors[f"{block}{part}.weight"] = matrix(rows, columns)
            if kind == "qwen2" and part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                tensors[f"{block}{part}.bias"] = matrix(rows)
        tensors[f"{block}input_layernorm.weight"] = norm(HIDDEN)
        tensors[f"{block}post_attention_layernorm.weight"] = norm(HIDDEN)
        if kind == "qwen3":
            tensors[f"{block}self_attn.q_norm.weight"] = norm(HEAD_DIM)
            tensors[f"{block}self_attn.k_norm.weight"] = norm(HEAD_DIM)
    return tensors | {"lm_head.weight": matrix(VOCABULARY, HIDDEN)}


def write_model(
    folder: Path, kind: str = "llama", changes: Mapping[str, Any] | None = None, tensors: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, Path]:
    """The files by name; `changes` to config.json (`...` removes a field)."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE({sign: byte for byte, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("<pad>", "<s>", "</s>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = {
        "config.json": config(kind, **(changes or {})),
        "generation_config.json": {"eos_token_id": [258, 256]},
        "tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>", "chat_template": "{{ messages[0].content }}"},
    }
    for name, values in texts.items():
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", weights(kind) if tensors is None else tensors)
    return files_of(folder)


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir() if path.is_file()}


def adapter_tensors(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """peft's names for the projections of `shapes`: name in the repository → rows, columns."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = (0.3 * rng.standard_normal((rank, columns))).astype(np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = (0.3 * rng.standard_normal((rows, rank))).astype(np.float32)
    return tensors
