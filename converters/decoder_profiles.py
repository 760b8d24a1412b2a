"""Shapes that an engine of the standard form is built for: one profile for steps, one for pieces of prompts."""

from __future__ import annotations

from converters.decoder import Decoder

# [least, usual, most] of each axis, by input.
Profile = dict[str, list[list[int]]]


def decoder_profiles(decoder: Decoder, slots: int, capacity: int, chunk: int, has_adapters: bool = False) -> list[Profile]:
    """Profile 0 advances up to `slots` rows by one token, profile 1 one row by up to `chunk`; a row holds up to `capacity` tokens.

    One position's logits are computed for each row. What is usual decides what is fastest: all slots, whole chunks, a full cache.
    """
    capacity = min(capacity, decoder.context_tokens)
    chunk = min(chunk, capacity)
    return [
        _profile(decoder, (1, slots, slots), (1, 1, 1), capacity, has_adapters),
        _profile(decoder, (1, 1, 1), (1, chunk, chunk), capacity, has_adapters),
    ]


def _profile(decoder: Decoder, rows: tuple[int, int, int], tokens: tuple[int, int, int], capacity: int, has_adapters: bool) -> Profile:
    past = (1, capacity, capacity)
    profile: Profile = {
        "input_ids": [[row, token] for row, token in zip(rows, tokens, strict=True)],
        "lengths": [[row] for row in rows],
        "logits_at": [[row, 1] for row in rows],
    }
    if has_adapters:
        profile["adapter"] = [[row] for row in rows]
    cache = [[row, held, decoder.kv_heads, decoder.head_dim] for row, held in zip(rows, past, strict=True)]
    return profile | {f"past.{layer}.{part}": cache for layer in range(decoder.layers) for part in ("key", "value")}
