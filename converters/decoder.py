"""Facts of a Llama-class decoder, whatever file they were read from, and the check of its weights against them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.decoder_source import DecoderSource
from converters.errors import ConversionError, unsupported

MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_WIDTH = 1 << 20
# What GroupQueryAttention of ONNX Runtime turns at a time.
HEAD_MULTIPLE = 16


@dataclass(frozen=True)
class Decoder:
    """`rope_factors` divide the RoPE frequencies (float32 [head_dim / 2], ones where there is no scaling)."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    feed_forward: int
    vocabulary: int
    context_tokens: int
    rms_epsilon: float
    rope_base: float
    rope_factors: NDArray[np.float32]
    tied_head: bool
    normalises_heads: bool
    has_interleaved_rows: bool


def rope_tables(decoder: Decoder) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin, each float32 [context_tokens, head_dim / 2]."""
    exponents = np.arange(0, decoder.head_dim, 2, dtype=np.float64) / decoder.head_dim
    frequencies = decoder.rope_base**-exponents / decoder.rope_factors
    angles = np.arange(decoder.context_tokens, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def check_decoder(source: DecoderSource, decoder: Decoder) -> None:
    """Refuse what the graph cannot express, weights that have no place in it, and shapes that contradict the facts.

    Raises ConversionError.
    """
    file = source.path.name
    for is_unsupported, reason in (
        (decoder.head_dim % HEAD_MULTIPLE, f"head dimension {decoder.head_dim} is not a multiple of {HEAD_MULTIPLE}"),
        (decoder.heads % decoder.kv_heads, f"{decoder.heads} heads cannot share {decoder.kv_heads} key-value heads evenly"),
    ):
        if is_unsupported:
            raise unsupported(f"{file}: {reason}")
    known = {"token_embd.weight", "output.weight", "output_norm.weight", "rope_freqs.weight"}
    for layer in range(decoder.layers):
        known |= {f"blk.{layer}.{part}" for part in _PARTS}
    unknown = sorted(set(source.tensors) - known)
    if unknown:
        raise unsupported(f"{file}: tensor {unknown[0]!r} has no place in a {decoder.architecture} decoder of {decoder.layers} layers here")
    _check_shapes(source, decoder)


_PARTS = (
    *("attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"),
    *("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_q_norm.weight", "attn_k_norm.weight"),
    *("ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"),
)


def _check_shapes(source: DecoderSource, decoder: Decoder) -> None:
    hidden, inner = decoder.hidden, decoder.feed_forward
    queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    if decoder.vocabulary > MAX_WIDTH:
        raise ConversionError(f"{source.path.name}: a vocabulary of {decoder.vocabulary} tokens is more than {MAX_WIDTH}")
    expect_shape(source, "token_embd.weight", (decoder.vocabulary, hidden))
    expect_shape(source, "output_norm.weight", (hidden,))
    if not decoder.tied_head:
        expect_shape(source, "output.weight", (decoder.vocabulary, hidden))
    for layer in range(decoder.layers):
        block = f"blk.{layer}."
        for part, shape in (
            ("attn_norm.weight", (hidden,)),
            ("attn_q.weight", (queries, hidden)),
            ("attn_k.weight", (keys, hidden)),
            ("attn_v.weight", (keys, hidden)),
            ("attn_output.weight", (hidden, queries)),
            ("ffn_norm.weight", (hidden,)),
            ("ffn_gate.weight", (inner, hidden)),
            ("ffn_up.weight", (inner, hidden)),
            ("ffn_down.weight", (hidden, inner)),
        ):
            expect_shape(source, block + part, shape)
        for part, width in (("attn_q.bias", queries), ("attn_k.bias", keys), ("attn_v.bias", keys)):
            if block + part in source.tensors:
                expect_shape(source, block + part, (width,))
        for part in ("attn_q_norm.weight", "attn_k_norm.weight"):
            if decoder.normalises_heads:
                expect_shape(source, block + part, (decoder.head_dim,))
            elif block + part in source.tensors:
                raise unsupported(f"{source.path.name}: {block + part} in a {decoder.architecture} decoder is not implemented")


def expect_shape(source: DecoderSource, name: str, shape: tuple[int, ...]) -> None:
    """Raises ConversionError where a weight is missing or has another shape."""
    found = source.shape(name)
    if found != shape:
        raise ConversionError(f"{source.path.name}: tensor {name!r} has shape {found}, its facts ask for {shape}; the file is damaged")
