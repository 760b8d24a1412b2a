"""Facts of a Llama-class decoder, read from GGUF metadata; what is not implemented is refused by name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.errors import ConversionError, unsupported
from converters.gguf import GgufFile

# Architectures whose blocks are RMS norm → attention with RoPE → RMS norm → gated SiLU. Mistral's files say `llama`.
# llama.cpp stores q and k of `llama` with the rows of each head interleaved; of the others as published.
INTERLEAVED_ROWS = {"llama": True, "qwen2": False, "qwen3": False}
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_WIDTH = 1 << 20


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


def decoder_from_gguf(gguf: GgufFile, context_tokens: int | None = None) -> Decoder:
    """Read and check the facts; `context_tokens` shortens the model's own context. Raises ConversionError."""
    architecture = gguf.text("general.architecture")
    if architecture not in INTERLEAVED_ROWS:
        raise unsupported(f"architecture {architecture!r} is not converted here; supported are {', '.join(INTERLEAVED_ROWS)}")

    def fact(name: str, limit: int, default: int | None = None) -> int:
        value = gguf.integer(f"{architecture}.{name}", default)
        if not 1 <= value <= limit:
            raise ConversionError(f"{gguf.path.name}: {architecture}.{name} is {value}, outside 1..{limit}; the file is damaged")
        return value

    heads = fact("attention.head_count", MAX_HEADS)
    hidden = fact("embedding_length", MAX_WIDTH)
    head_dim = fact("attention.key_length", MAX_WIDTH, max(hidden // heads, 1))
    own_context = fact("context_length", 1 << 24)
    context = min(own_context, context_tokens or own_context)
    decoder = Decoder(
        architecture=architecture,
        layers=fact("block_count", MAX_LAYERS),
        heads=heads,
        kv_heads=fact("attention.head_count_kv", MAX_HEADS, heads),
        head_dim=head_dim,
        hidden=hidden,
        feed_forward=fact("feed_forward_length", MAX_WIDTH),
        vocabulary=gguf.tensor("token_embd.weight").shape[0],
        context_tokens=context,
        rms_epsilon=gguf.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        rope_base=gguf.number(f"{architecture}.rope.freq_base", 10000.0),
        rope_factors=_rope_factors(gguf, architecture, head_dim),
        tied_head="output.weight" not in gguf.tensors,
        normalises_heads=architecture == "qwen3",
        has_interleaved_rows=INTERLEAVED_ROWS[architecture],
    )
    _refuse_unknown_parts(gguf, decoder)
    _check_shapes(gguf, decoder)
    return decoder


def rope_tables(decoder: Decoder) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin, each float32 [context_tokens, head_dim / 2]."""
    exponents = np.arange(0, decoder.head_dim, 2, dtype=np.float64) / decoder.head_dim
    frequencies = decoder.rope_base**-exponents / decoder.rope_factors
    angles = np.arange(decoder.context_tokens, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rope_factors(gguf: GgufFile, architecture: str, head_dim: int) -> NDArray[np.float32]:
    kind = gguf.text(f"{architecture}.rope.scaling.type", "none")
    factors = np.ones(head_dim // 2, np.float32)
    if kind == "linear":
        factors *= np.float32(gguf.number(f"{architecture}.rope.scaling.factor"))
    elif kind != "none":
        raise unsupported(f"RoPE scaling {kind!r} is not implemented; use a model with none, linear or Llama-3 frequency factors")
    if "rope_freqs.weight" in gguf.tensors:
        _expect(gguf, "rope_freqs.weight", (head_dim // 2,))
        factors = factors * gguf.float32("rope_freqs.weight")
    if not np.all(np.isfinite(factors)) or np.any(factors <= 0):
        raise ConversionError(f"{gguf.path.name}: RoPE frequency factors are not positive numbers; the file is damaged")
    return factors


def _refuse_unknown_parts(gguf: GgufFile, decoder: Decoder) -> None:
    name = decoder.architecture
    window = gguf.integer(f"{name}.attention.sliding_window", 0)
    checks = [
        (decoder.head_dim % 2 or decoder.head_dim % 8, f"head dimension {decoder.head_dim} is not a multiple of 8"),
        (decoder.heads % decoder.kv_heads, f"{decoder.heads} heads cannot share {decoder.kv_heads} key-value heads evenly"),
        (gguf.integer(f"{name}.expert_count", 0), "mixtures of experts are not implemented"),
        (gguf.integer(f"{name}.rope.dimension_count", decoder.head_dim) != decoder.head_dim, "partial RoPE is not implemented"),
        (gguf.integer(f"{name}.attention.value_length", decoder.head_dim) != decoder.head_dim, "values narrower or wider than keys"),
        (
            0 < window < decoder.context_tokens,
            f"a sliding window of {window} tokens is not implemented; build with context_tokens={window} at most",
        ),
    ]
    for is_unsupported, reason in checks:
        if is_unsupported:
            raise unsupported(f"{gguf.path.name}: {reason}")
    known = {"token_embd.weight", "output.weight", "output_norm.weight", "rope_freqs.weight"}
    for layer in range(decoder.layers):
        known |= {f"blk.{layer}.{part}" for part in _PARTS}
    unknown = sorted(set(gguf.tensors) - known)
    if unknown:
        raise unsupported(f"{gguf.path.name}: tensor {unknown[0]!r} has no place in a {name} decoder of {decoder.layers} layers here")


_PARTS = (
    *("attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"),
    *("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_q_norm.weight", "attn_k_norm.weight"),
    *("ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"),
)


def _check_shapes(gguf: GgufFile, decoder: Decoder) -> None:
    hidden, inner = decoder.hidden, decoder.feed_forward
    queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    if decoder.vocabulary > MAX_WIDTH:
        raise ConversionError(f"{gguf.path.name}: a vocabulary of {decoder.vocabulary} tokens is more than {MAX_WIDTH}")
    _expect(gguf, "token_embd.weight", (decoder.vocabulary, hidden))
    _expect(gguf, "output_norm.weight", (hidden,))
    if not decoder.tied_head:
        _expect(gguf, "output.weight", (decoder.vocabulary, hidden))
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
            _expect(gguf, block + part, shape)
        for part, width in (("attn_q.bias", queries), ("attn_k.bias", keys), ("attn_v.bias", keys)):
            if block + part in gguf.tensors:
                _expect(gguf, block + part, (width,))
        for part in ("attn_q_norm.weight", "attn_k_norm.weight"):
            if decoder.normalises_heads:
                _expect(gguf, block + part, (decoder.head_dim,))
            elif block + part in gguf.tensors:
                raise unsupported(f"{gguf.path.name}: {block + part} in a {decoder.architecture} decoder is not implemented")


def _expect(gguf: GgufFile, name: str, shape: tuple[int, ...]) -> None:
    found = gguf.tensor(name).shape
    if found != shape:
        raise ConversionError(f"{gguf.path.name}: tensor {name!r} has shape {found}, its metadata asks for {shape}; the file is damaged")
