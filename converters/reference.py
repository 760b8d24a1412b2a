"""A Llama-class decoder in plain numpy float32, straight from the weights: slow, clear, the yardstick of verification.

It shares the file reader and the unpacking of blocks with the converter, but neither the graph nor the order of rows: RoPE turns the
neighbouring pairs that llama.cpp stores, where the graph turns halves.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from converters.decoder import Decoder, rope_tables
from converters.decoder_source import DecoderSource
from converters.quantised_blocks import Float


class ReferenceDecoder:
    """One sequence with its own key-value cache; `step` appends tokens.

    Weights are dequantised once and held (4 bytes each), or with `holds_weights` false at every use, where that much memory is not to be
    had.
    """

    def __init__(self, source: DecoderSource, decoder: Decoder, holds_weights: bool = True) -> None:
        self.decoder = decoder
        self._source = source
        self._held: dict[str, Float] = {name: source.float32(name) for name in source.tensors} if holds_weights else {}
        self._cos, self._sin = rope_tables(decoder)
        self.clear()

    def clear(self) -> None:
        """Forget the sequence."""
        empty = np.zeros((0, self.decoder.kv_heads, self.decoder.head_dim), np.float32)
        self._past = [(empty, empty)] * self.decoder.layers

    def step(self, tokens: Iterable[int], num_logits: int | None = None) -> Float:
        """Append tokens; float32 logits [num_logits or all, vocabulary] of the last positions."""
        ids = np.fromiter(tokens, np.int64)
        value = self._weight("token_embd.weight")[ids]
        for layer in range(self.decoder.layers):
            value = value + self._attention(self._norm(value, f"blk.{layer}.attn_norm.weight"), layer)
            value = value + self._feed_forward(self._norm(value, f"blk.{layer}.ffn_norm.weight"), layer)
        value = self._norm(value[len(ids) - (len(ids) if num_logits is None else num_logits) :], "output_norm.weight")
        logits: Float = value @ self._weight("token_embd.weight" if self.decoder.tied_head else "output.weight").T
        return logits

    def greedy(self, prompt: Iterable[int], count: int, stop: Iterable[int] = ()) -> list[int]:
        """The next `count` tokens after a prompt, each the most likely one; ends early behind a token of `stop`."""
        self.clear()
        logits = self.step(prompt, 1)
        chosen: list[int] = []
        while len(chosen) < count:
            chosen.append(int(logits[-1].argmax()))
            if chosen[-1] in set(stop):
                break
            logits = self.step(chosen[-1:], 1)
        return chosen

    def _weight(self, name: str) -> Float:
        held = self._held.get(name)
        return self._source.float32(name) if held is None else held

    def _norm(self, value: Float, name: str) -> Float:
        mean = np.mean(value * value, axis=-1, keepdims=True)
        normed: Float = value / np.sqrt(mean + np.float32(self.decoder.rms_epsilon)) * self._weight(name)
        return normed

    def _project(self, value: Float, layer: int, part: str, heads: int) -> Float:
        """[tokens, heads, head_dim]"""
        projected: Float = value @ self._weight(f"blk.{layer}.attn_{part}.weight").T
        bias = f"blk.{layer}.attn_{part}.bias"
        if bias in self._source.tensors:
            projected = projected + self._weight(bias)
        projected = projected.reshape(len(value), heads, self.decoder.head_dim)
        if part != "v" and self.decoder.normalises_heads:
            projected = self._norm(projected, f"blk.{layer}.attn_{part}_norm.weight")
        return projected

    def _rotate(self, value: Float, start: int) -> Float:
        cos, sin = (table[start : start + len(value), None] for table in (self._cos, self._sin))
        turned = np.empty_like(value)
        half = self.decoder.head_dim // 2
        first, second = (
            (np.s_[..., 0::2], np.s_[..., 1::2]) if self.decoder.has_interleaved_rows else (np.s_[..., :half], np.s_[..., half:])
        )
        turned[first] = value[first] * cos - value[second] * sin
        turned[second] = value[second] * cos + value[first] * sin
        return turned

    def _attention(self, value: Float, layer: int) -> Float:
        decoder = self.decoder
        past_keys, past_values = self._past[layer]
        start = len(past_keys)
        query = self._rotate(self._project(value, layer, "q", decoder.heads), start)
        key = self._rotate(self._project(value, layer, "k", decoder.kv_heads), start)
        keys = np.concatenate([past_keys, key])
        values = np.concatenate([past_values, self._project(value, layer, "v", decoder.kv_heads)])
        self._past[layer] = (keys, values)
        group = decoder.heads // decoder.kv_heads
        query = query.reshape(len(value), decoder.kv_heads, group, decoder.head_dim).transpose(1, 2, 0, 3)
        scores = query @ keys.transpose(1, 2, 0)[:, None] * np.float32(decoder.head_dim**-0.5)
        is_later = np.arange(len(keys))[None] > np.arange(start, start + len(value))[:, None]
        scores[..., is_later] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        attended = (scores @ values.transpose(1, 0, 2)[:, None]).transpose(2, 0, 1, 3)
        output: Float = attended.reshape(len(value), -1) @ self._weight(f"blk.{layer}.attn_output.weight").T
        return output

    def _feed_forward(self, value: Float, layer: int) -> Float:
        gate = value @ self._weight(f"blk.{layer}.ffn_gate.weight").T
        with np.errstate(over="ignore"):  # exp overflows to infinity for very negative gates; the quotient is then 0, as it should be
            gated = gate / (1 + np.exp(-gate))
        up = value @ self._weight(f"blk.{layer}.ffn_up.weight").T
        output: Float = (gated * up) @ self._weight(f"blk.{layer}.ffn_down.weight").T
        return output
