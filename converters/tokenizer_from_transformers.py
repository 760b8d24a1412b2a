"""Vocabulary and chat template from the files of a Hugging Face repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from converters.errors import ConversionError
from converters.json_object import JsonObject, read_json_object
from converters.vocabulary import TURN_ENDS, Vocabulary

MAX_TOKENIZER_BYTES = 64 << 20
MAX_CONFIG_BYTES = 16 << 20


def vocabulary_from_transformers(files: Mapping[str, Path]) -> Vocabulary:
    """`files`: fetched files by their published names. Ends of an answer are what config.json, generation_config.json and
    tokenizer_config.json call so, and the known marks of a turn. Raises ConversionError, OSError."""
    tokenizer = _tokenizer(files)
    own = _optional(files, "tokenizer_config.json", MAX_CONFIG_BYTES)
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    marks = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    configs = [_optional(files, name) for name in ("generation_config.json", "config.json")]
    ends: list[int] = []
    for config in configs:
        ends += _ids(config, "eos_token_id", size)
    turns = [tokenizer.token_to_id(mark) for mark in marks & set(TURN_ENDS)]
    named = _mark(own, "eos_token", tokenizer)
    bos = _mark(own, "bos_token", tokenizer)
    starts = [token for config in configs for token in _ids(config, "bos_token_id", size)]
    return Vocabulary(
        tokenizer=tokenizer,
        size=size,
        bos_id=bos if bos is not None or not starts else starts[0],
        eos_id=named if named is not None or not ends else ends[0],
        eos_ids=tuple(sorted({token for token in (*ends, *turns, named) if token is not None})),
        add_bos=own.flag("add_bos_token", False),
    )


def chat_template_from_transformers(files: Mapping[str, Path], limit_bytes: int) -> str:
    """The template for conversations; empty where the model has none. Raises ConversionError, OSError."""
    if "chat_template.jinja" in files:
        content = files["chat_template.jinja"].read_bytes() if files["chat_template.jinja"].stat().st_size <= limit_bytes else None
        if content is None:
            raise ConversionError(f"chat_template.jinja has more than {limit_bytes} bytes, more than a template can need")
        return content.decode("utf-8", errors="replace")
    template = _optional(files, "tokenizer_config.json", MAX_CONFIG_BYTES).values.get("chat_template", "")
    if isinstance(template, list):
        # Several by name: the one for plain conversations is the one we render.
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", "")
    if not isinstance(template, str) or len(template.encode()) > limit_bytes:
        raise ConversionError(f"tokenizer_config.json: chat_template is no text of at most {limit_bytes} bytes; the file is damaged")
    return template


def _tokenizer(files: Mapping[str, Path]) -> Tokenizer:
    if "tokenizer.json" not in files:
        raise ConversionError(
            f"tokenizer.json is not among the model's files ({', '.join(sorted(files))}); add it to the manifest's [files] "
            "(transformers writes it: AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    path = files["tokenizer.json"]
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ConversionError(f"tokenizer.json has {path.stat().st_size} bytes, more than {MAX_TOKENIZER_BYTES}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a file that it cannot read
        raise ConversionError(f"tokenizer.json is not one: {error}; fetch it again") from error
    # Lengths are decided by the engine.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _optional(files: Mapping[str, Path], name: str, limit_bytes: int = 1 << 20) -> JsonObject:
    return read_json_object(files[name], name, limit_bytes) if name in files else JsonObject(name, {})


def _ids(config: JsonObject, key: str, size: int) -> list[int]:
    """One id, a list of them, or none."""
    value: Any = config.values.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and 0 <= token < size for token in ids):
        raise ConversionError(f"{config.name}: {key} is {str(value)[:80]}, outside the {size} tokens; fetch all files of one revision")
    return list(ids)


def _mark(config: JsonObject, key: str, tokenizer: Tokenizer) -> int | None:
    value: Any = config.values.get(key)
    # Saved as a text, or with its properties.
    text = value.get("content") if isinstance(value, dict) else value
    token: int | None = tokenizer.token_to_id(text) if isinstance(text, str) else None
    return token
