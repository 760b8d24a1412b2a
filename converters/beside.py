"""Files of a model that go into the engine's folder as they are; one from the manifest wins over what a GGUF holds."""

from __future__ import annotations

import shutil
from pathlib import Path

from converters.errors import ConversionError
from converters.request import BuildRequest

MAX_TOKENIZER_BYTES = 64 << 20
BESIDE = {"tokenizer": "tokenizer.json", "chat_template": "chat_template.jinja"}


def copy_beside(request: BuildRequest, folder: Path) -> None:
    """Raises ConversionError for a file that is too large to be what it is called."""
    for role, name in BESIDE.items():
        if role in request.sources:
            size = request.sources[role].stat().st_size
            if size > MAX_TOKENIZER_BYTES:
                raise ConversionError(f"files.{role} of {request.manifest.name} has {size} bytes, more than {MAX_TOKENIZER_BYTES}")
            shutil.copyfile(request.sources[role], folder / name)
