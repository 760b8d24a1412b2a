"""A causal language model → a folder that a generation engine opens: graph, weights, tokenizer, chat template, facts."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from converters.causal_model import CausalModel
from converters.decoder_graph import Form, Progress, write_decoder_graph
from converters.decoder_source import DecoderSource
from converters.lora import Adapter
from converters.onnxruntime_operators import OnnxRuntimeForm

# Part of the engine key: raise it with every change that changes what is written.
VERSION = 2

log = logging.getLogger(__name__)


def onnx_from_causal_model(model: CausalModel, folder: Path, form: Form, progress: Progress, adapters: Sequence[Adapter] = ()) -> None:
    """Write `model.onnx`, `model.onnx.data`, `tokenizer.json`, `chat_template.jinja` (if there is one) and `generation.json`.

    `adapters` are kept apart: the graph takes the number of one for each row, counted from 1 in this order. Raises ConversionError.
    """
    formats = _formats(model.source)
    if isinstance(form, OnnxRuntimeForm) and {"F16", "BF16"} & set(formats):
        log.info("weights stored as %s are multiplied in float32", ", ".join(sorted({"F16", "BF16"} & set(formats))))
    write_decoder_graph(model.source, model.decoder, folder, form, progress, adapters)
    model.vocabulary.tokenizer.save(str(folder / "tokenizer.json"))
    if model.chat_template:
        (folder / "chat_template.jinja").write_text(model.chat_template, encoding="utf-8")
    facts = _facts(model, form, adapters) | {"weights": dict(formats)}
    (folder / "generation.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    progress(1.0, "written")


def _facts(model: CausalModel, form: Form, adapters: Sequence[Adapter]) -> dict[str, object]:
    decoder, vocabulary = model.decoder, model.vocabulary
    return {
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
        "adapters": [adapter.name for adapter in adapters],
        **({"activations": form.activations} if isinstance(form, OnnxRuntimeForm) else {"compute": form.compute}),
    }


def _formats(source: DecoderSource) -> Counter[str]:
    """How many matrices are stored in which format."""
    return Counter(source.format(name) for name in source.tensors if len(source.shape(name)) > 1)
