"""GGUF → a folder that the generation engine opens: graph, weights, tokenizer, chat template, facts."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

from converters.decoder import Decoder
from converters.decoder_from_gguf import decoder_from_gguf
from converters.decoder_graph import Progress, write_decoder_graph
from converters.errors import ConversionError
from converters.gguf import GgufFile, read_gguf
from converters.onnxruntime_operators import Activations, OnnxRuntimeForm
from converters.tokenizer_from_gguf import Vocabulary, vocabulary_from_gguf

# Part of the engine key: raise it with every change that changes what is written.
VERSION = 1
MAX_TEMPLATE_BYTES = 1 << 20

log = logging.getLogger(__name__)


def onnx_from_gguf(
    source: Path, folder: Path, activations: Activations, progress: Progress, context_tokens: int | None = None
) -> tuple[GgufFile, Decoder]:
    """Write `model.onnx`, `model.onnx.data`, `tokenizer.json`, `chat_template.jinja` (if there is one) and `generation.json`.

    `activations` float32 computes with the exact values of the quantised weights; int8 also rounds the activations, block by block.
    `context_tokens` shortens the model's context (and the RoPE tables with it). Raises ConversionError.
    """
    gguf = read_gguf(source)
    decoder = decoder_from_gguf(gguf, context_tokens)
    vocabulary = vocabulary_from_gguf(gguf)
    if vocabulary.size > decoder.vocabulary:
        raise ConversionError(f"{source.name}: {vocabulary.size} tokens, but embeddings for {decoder.vocabulary}; the file is damaged")
    kept_plain = sorted({layout for layout, count in _formats(gguf).items() if layout in ("F16", "BF16", "F32")})
    if kept_plain != ["F32"] and kept_plain:
        log.info("weights stored as %s are multiplied in float32", ", ".join(kept_plain))
    write_decoder_graph(gguf, decoder, folder, OnnxRuntimeForm(activations), progress)
    vocabulary.tokenizer.save(str(folder / "tokenizer.json"))
    template = gguf.text("tokenizer.chat_template", "")
    if len(template.encode()) > MAX_TEMPLATE_BYTES:
        raise ConversionError(f"{source.name}: its chat template has {len(template)} characters, more than a template can need")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    facts = json.dumps(_facts(gguf, decoder, vocabulary, activations), indent=1)
    (folder / "generation.json").write_text(facts, encoding="utf-8")
    progress(1.0, "written")
    return gguf, decoder


def _facts(gguf: GgufFile, decoder: Decoder, vocabulary: Vocabulary, activations: Activations) -> dict[str, object]:
    return {
        "architecture": decoder.architecture,
        "layers": decoder.layers,
        "heads": decoder.heads,
        "kv_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "hidden": decoder.hidden,
        "vocabulary": decoder.vocabulary,
        "context_tokens": decoder.context_tokens,
        "eos_ids": list(vocabulary.eos_ids),
        "bos_id": vocabulary.bos_id,
        "add_bos": vocabulary.add_bos,
        "activations": activations,
        "weights": dict(_formats(gguf)),
    }


def _formats(gguf: GgufFile) -> Counter[str]:
    """How many matrices are stored in which format."""
    return Counter(tensor.layout.name for tensor in gguf.tensors.values() if len(tensor.shape) > 1)
