"""Facts of a Llama-class decoder from GGUF metadata; what is not implemented is refused by name."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from converters.decoder import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Decoder, check_decoder, expect_shape
from converters.errors import ConversionError, unsupported
from converters.gguf import GgufFile

# Architectures whose blocks are RMS norm → attention with RoPE → RMS norm → gated SiLU. Mistral's files say `llama`.
# llama.cpp stores q and k of `llama` with the rows of each head interleaved; of the others as published.
INTERLEAVED_ROWS = {"llama": True, "qwen2": False, "qwen3": False}


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
    check_decoder(gguf, decoder)
    return decoder


def _rope_factors(gguf: GgufFile, architecture: str, head_dim: int) -> NDArray[np.float32]:
    kind = gguf.text(f"{architecture}.rope.scaling.type", "none")
    factors = np.ones(head_dim // 2, np.float32)
    if kind == "linear":
        factors *= np.float32(gguf.number(f"{architecture}.rope.scaling.factor"))
    elif kind != "none":
        raise unsupported(f"RoPE scaling {kind!r} is not implemented; use a model with none, linear or Llama-3 frequency factors")
    if "rope_freqs.weight" in gguf.tensors:
        expect_shape(gguf, "rope_freqs.weight", (head_dim // 2,))
        factors = factors * gguf.float32("rope_freqs.weight")
    if not np.all(np.isfinite(factors)) or np.any(factors <= 0):
        raise ConversionError(f"{gguf.path.name}: RoPE frequency factors are not positive numbers; the file is damaged")
    return factors


def _refuse_unknown_parts(gguf: GgufFile, decoder: Decoder) -> None:
    name = decoder.architecture
    window = gguf.integer(f"{name}.attention.sliding_window", 0)
    checks = [
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
