"""What lies beside the weights of a causal language model, whatever runtime has them: tokenizer, chat template, facts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.causal_model import CausalModel
from converters.decoder_source import DecoderSource


def write_beside(model: CausalModel, folder: Path, notes: Mapping[str, Any], adapters: Sequence[str] = ()) -> None:
    """Write `tokenizer.json`, `chat_template.jinja` (if there is one) and `generation.json`, which ends with the converter's notes."""
    model.vocabulary.tokenizer.save(str(folder / "tokenizer.json"))
    if model.chat_template:
        (folder / "chat_template.jinja").write_text(model.chat_template, encoding="utf-8")
    decoder, vocabulary = model.decoder, model.vocabulary
    facts = {
        "architecture": decoder.architecture,
        "layers": decoder.layers,
        "heads": decoder.heads,
        "kv_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "hidden": decoder.hidden,
        "vocabulary": decoder.vocabulary,
        "context_tokens": decoder.context_tokens,
        "eos_id": vocabulary.eos_id,
        "eos_ids": list(vocabulary.eos_ids),
        "bos_id": vocabulary.bos_id,
        "add_bos": vocabulary.add_bos,
        "adapters": list(adapters),
        **notes,
        "weights": dict(weight_formats(model.source)),
    }
    (folder / "generation.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def weight_formats(source: DecoderSource) -> Counter[str]:
    """How many matrices are stored in which format."""
    return Counter(source.format(name) for name in source.tensors if len(source.shape(name)) > 1)
