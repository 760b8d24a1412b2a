"""A causal language model as it was fetched, from a GGUF file or the files of a Hugging Face repository, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.decoder import Decoder
from converters.decoder_from_gguf import decoder_from_gguf
from converters.decoder_from_transformers import decoder_from_transformers
from converters.decoder_source import DecoderSource
from converters.errors import ConversionError
from converters.gguf import read_gguf
from converters.tokenizer_from_gguf import vocabulary_from_gguf
from converters.tokenizer_from_transformers import chat_template_from_transformers, vocabulary_from_transformers
from converters.vocabulary import Vocabulary

MAX_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True)
class CausalModel:
    """`chat_template` is empty where the model has none."""

    source: DecoderSource
    decoder: Decoder
    vocabulary: Vocabulary
    chat_template: str


def model_from_gguf(path: Path, context_tokens: int | None = None) -> CausalModel:
    """`context_tokens` shortens the model's own context. Raises ConversionError, OSError."""
    gguf = read_gguf(path)
    decoder = decoder_from_gguf(gguf, context_tokens)
    template = gguf.text("tokenizer.chat_template", "")
    if len(template.encode()) > MAX_TEMPLATE_BYTES:
        raise ConversionError(f"{path.name}: its chat template has {len(template)} characters, more than a template can need")
    return _checked(CausalModel(gguf, decoder, vocabulary_from_gguf(gguf), template))


def model_from_transformers(files: Mapping[str, Path], context_tokens: int | None = None) -> CausalModel:
    """`files`: fetched files by their published names: config.json, model.safetensors (or its index and shards), tokenizer.json; if there
    are any, generation_config.json, tokenizer_config.json, chat_template.jinja. Raises ConversionError, OSError."""
    source, decoder = decoder_from_transformers(files, context_tokens)
    template = chat_template_from_transformers(files, MAX_TEMPLATE_BYTES)
    return _checked(CausalModel(source, decoder, vocabulary_from_transformers(files), template))


def _checked(model: CausalModel) -> CausalModel:
    size, rows = model.vocabulary.size, model.decoder.vocabulary
    if size > rows:
        raise ConversionError(f"{model.source.path.name}: {size} tokens, but embeddings for {rows}; the file is damaged")
    return model
