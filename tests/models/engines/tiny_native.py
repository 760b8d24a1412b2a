"""A decoder of two small layers for the native engine: random weights, compiled here."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def write_tiny_native(folder: Path) -> Path:
    """Write model.native, its library and generation.json into `folder`; returns it. Needs Python 3.10 and a C compiler."""
    from converters.causal_model import model_from_gguf
    from converters.native_from_causal_model import native_from_causal_model
    from tests.converters.tiny_gguf import Recipe, write_decoder

    folder.mkdir(parents=True, exist_ok=True)
    model = model_from_gguf(write_decoder(folder.parent / f"{folder.name}.gguf", Recipe(metadata={"llama.context_length": 256})))
    native_from_causal_model(model, folder, lambda fraction, message: None, "float32")
    return folder


def why_not() -> str:
    """Why it cannot be made here; empty where it can."""
    if sys.version_info < (3, 10):
        return "models are converted by Python 3.10 or later"
    return "" if any(shutil.which(name) for name in ("cc", "gcc", "clang")) else "no C compiler"
