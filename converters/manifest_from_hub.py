"""A manifest for a model of a hub: `hf:owner/repository[@revision]`, a folder in the form of Hugging Face, or one file of it with `/path`.

No listing is asked for: the files that such a folder may have are asked for by their names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from converters.errors import ConversionError
from converters.json_object import read_json_object
from converters.manifest_from_onnx import TOKENIZER_FILES
from converters.manifest_from_path import manifest_from_path
from converters.manifest_from_transformers import FILES, INDEX, MAX_INDEX_BYTES
from models.manifest import Manifest, ModelFile, manifest_from_mapping
from models.record import to_mapping
from models.sources import NotThere
from models.store import Store

LOCATION = re.compile(r"^hf:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.-]+))?(?:/(.+))?$", re.ASCII)
MAIN = "main"
# Facts of sentence encoders, and the licence on the model card; read, and not part of the model.
READ_ONLY = ("README.md", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "labels.txt")

Fetch = Callable[[ModelFile], Path]


def is_hub(text: str) -> bool:
    return text.startswith("hf:")


def manifest_from_hub(text: str, store: Store, fetch: Fetch, name: str = "", given: Mapping[str, Any] | None = None) -> Manifest:
    """Fetches what the manifest has to be read from, weights too. Raises ConversionError, SourceError, StoreError, OSError."""
    match = LOCATION.match(text)
    if match is None:
        raise ConversionError(f"{text!r} is not hf:owner/repository[@revision][/path]", "bad_request")
    repository, revision, path = match.group(1), match.group(2) or MAIN, match.group(3) or ""
    base = f"hf:{repository}@{revision}/"
    with store.temporary() as temporary:
        folder = temporary / repository.partition("/")[2]
        folder.mkdir()
        if path:
            target = _take(folder, base + path, PurePosixPath(path).name, fetch)
            if target is None:
                raise NotThere(f"{base}{path} does not exist")
            beside = [*TOKENIZER_FILES.values(), "preprocessor_config.json", "labels.txt", f"{target.name}_data", f"{target.name}.data"]
            sources = {**_take_all(folder, base, beside, fetch, str(PurePosixPath(path).parent)), target.name: base + path}
        else:
            sources = _folder(folder, base, fetch)
            target = folder
        manifest = manifest_from_path(target, name, given)
        values = to_mapping(manifest)
        for role, file in manifest.files.items():
            values["files"][role]["source"] = sources[Path(file.source.partition(":")[2]).name]
    return manifest_from_mapping(
        {**values, "summary": values["summary"] if path else f"{manifest.summary.partition(' from ')[0]} from {repository}"}
    )


def _folder(folder: Path, base: str, fetch: Fetch) -> dict[str, str]:
    if _take(folder, f"{base}config.json", "config.json", fetch) is None:
        raise NotThere(f"{base} has no config.json; name one file of it, such as {base}model.gguf")
    sources = {"config.json": f"{base}config.json"}
    (folder / "1_Pooling").mkdir()
    for role, names in FILES.items():
        for published in names:
            if role != "config" and _take(folder, base + published, published, fetch) is not None:
                sources[published] = base + published
                break
    if INDEX in sources:
        weights = read_json_object(folder / INDEX, INDEX, MAX_INDEX_BYTES).object("weight_map").values
        sources.update(_take_all(folder, base, sorted({str(shard) for shard in weights.values()}), fetch))
    _take_all(folder, base, READ_ONLY, fetch)
    return sources


def _take_all(folder: Path, base: str, names: Iterable[str], fetch: Fetch, under: str = ".") -> dict[str, str]:
    """Those that are there, beside the file that was asked for or at the top."""
    sources: dict[str, str] = {}
    for name in names:
        for source in dict.fromkeys((base + (f"{under}/{name}" if under != "." else name), base + name)):
            if _take(folder, source, name, fetch) is not None:
                sources[name] = source
                break
    return sources


def _take(folder: Path, source: str, name: str, fetch: Fetch) -> Path | None:
    """A hard link or copy under its published name: readers of folders take no links that lead elsewhere."""
    target = folder / name
    if folder not in target.resolve().parents:
        raise ConversionError(f"{source}: {name!r} is no name of a file", "bad_request")
    try:
        blob = fetch(ModelFile(source))
    except NotThere:
        return None
    target.hardlink_to(blob)
    return target
