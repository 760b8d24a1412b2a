"""What every engine of causal language models shares: the facts in `generation.json` and the rules of a step.

The tensors of a decoder stand in the first lines of `converters/decoder_graph.py`. In short, an engine of the standard form (TensorRT)
takes `input_ids [B, S]`, `lengths [B]`, `logits_at [B, L]` and `past.{i}.key|value [B, P, kv_heads, head_dim]`, and gives float32
`logits [B, L, vocabulary]` and `new.{i}.key|value [B, S, kv_heads, head_dim]`: the cache of a slot is its tokens in order, so what is
new is appended. Types are those the engine says, not those of the ONNX file it was built from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Tuple

from models.engines import EngineError, SlotTokens

FILE = "generation.json"
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class DecoderFacts:
    """Shapes and marks of one decoder.

    context_tokens  what the model was trained for; the KV capacity of a slot is never larger
    eos_ids         tokens that end an answer
    eos_id          the one of them that the model's own files call so; written into chat templates
    bos_id          token that opens a text, put in front of a prompt when `add_bos`
    adapters        names of the adapters kept apart; number 1 is the first, 0 the model without one
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    context_tokens: int
    eos_ids: Tuple[int, ...]
    eos_id: Optional[int] = None
    bos_id: Optional[int] = None
    add_bos: bool = False
    adapters: Tuple[str, ...] = ()

    def cache_bytes(self, slots: int, capacity: int) -> int:
        """Bytes of a float32 KV cache of `slots` sequences of `capacity` tokens."""
        return self.layers * 2 * slots * self.kv_heads * capacity * self.head_dim * 4


COUNTS = ("layers", "heads", "kv_heads", "head_dim", "hidden", "vocabulary", "context_tokens")


def read_facts(folder: Path) -> DecoderFacts:
    """Read `generation.json` of a converted model; fields it does not know are the converter's notes. Raises EngineError."""
    path = folder / FILE
    try:
        if path.stat().st_size > MAX_BYTES:
            raise EngineError(f"{path} is larger than {MAX_BYTES} bytes; it is no {FILE}: convert the model again")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read ({error}); convert the model again") from error
    if not isinstance(values, Mapping):
        raise EngineError(f"{path} is no JSON object; convert the model again")
    counts = {name: _count(values, name, path) for name in COUNTS}
    eos_ids = values.get("eos_ids", [])
    bos_id = values.get("bos_id")
    eos_id = values.get("eos_id", eos_ids[0] if isinstance(eos_ids, list) and eos_ids else None)
    if not isinstance(eos_ids, list):
        raise EngineError(f"{path}: eos_ids is {eos_ids!r}, must be a list of token ids; convert the model again")
    for mark in [*eos_ids, eos_id, bos_id]:
        if mark is not None and not (_is_integer(mark) and 0 <= mark < counts["vocabulary"]):
            raise EngineError(f"{path}: token id {mark!r} in eos_ids, eos_id or bos_id is outside the vocabulary of {counts['vocabulary']}")
    adapters = values.get("adapters", [])
    if not isinstance(adapters, list) or not all(isinstance(name, str) and name for name in adapters):
        raise EngineError(f"{path}: adapters is {adapters!r}, must be a list of names; convert the model again")
    return DecoderFacts(
        eos_ids=tuple(eos_ids), eos_id=eos_id, bos_id=bos_id, add_bos=values.get("add_bos") is True, adapters=tuple(adapters), **counts
    )


def check_step(
    batch: Sequence[SlotTokens], lengths: Sequence[int], capacity: int, vocabulary: int, adapters: int = 0, can_verify: bool = False
) -> None:
    """Refuse a step before it changes anything; `lengths` are the tokens held by each slot. Raises EngineError."""
    if not batch:
        raise EngineError("a step needs at least one slot with tokens")
    if len({item.slot for item in batch}) != len(batch):
        raise EngineError(f"a slot occurs twice in one step: {[item.slot for item in batch]}")
    for slot, tokens in ((item.slot, item.tokens) for item in batch):
        if not 0 <= slot < len(lengths):
            raise EngineError(f"slot {slot} does not exist: the engine was opened with {len(lengths)} slots")
        if len(tokens) == 0:
            raise EngineError(f"slot {slot}: a step needs at least one token")
        if lengths[slot] + len(tokens) > capacity:
            raise EngineError(f"slot {slot} holds {lengths[slot]} tokens; {len(tokens)} more exceed its capacity of {capacity} tokens")
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            raise EngineError(f"slot {slot}: a token id is outside the vocabulary of {vocabulary}")
    _check_wishes(batch, adapters, can_verify)


def _check_wishes(batch: Sequence[SlotTokens], adapters: int, can_verify: bool) -> None:
    for item in batch:
        if not 0 <= item.adapter <= adapters:
            raise EngineError(f"slot {item.slot}: there is no adapter {item.adapter}; the model was converted with {adapters}")
        if not 1 <= item.logits <= (len(item.tokens) if can_verify else 1):
            raise EngineError(f"slot {item.slot}: logits after {item.logits} of {len(item.tokens)} tokens are not to be had")


def _count(values: Mapping[str, Any], name: str, path: Path) -> int:
    value: Any = values.get(name)
    if not (_is_integer(value) and value > 0):
        raise EngineError(f"{path}: {name} is {value!r}, must be a positive integer; convert the model again")
    return int(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
