"""A manifest for a folder in the form of Hugging Face, from what its own configuration files say. Neither torch nor transformers needed.

Files: https://huggingface.co/docs/transformers/main_classes/configuration, and of sentence-transformers `modules.json`,
`1_Pooling/config.json`, `sentence_bert_config.json`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from converters.errors import ConversionError, unsupported
from converters.json_object import JsonObject, json_object, read_json_object
from converters.transformers_facts import (
    DETECTORS,
    Picture,
    dimensions_of,
    labels_of,
    model_type_of,
    picture_of,
    task_of,
    tokens_of,
)
from models.manifest import NAME, Manifest, ManifestError, manifest_from_mapping

# Role → published names, the first that is there.
FILES: dict[str, tuple[str, ...]] = {
    "model": ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    "config": ("config.json",),
    "preprocessor": ("preprocessor_config.json",),
    "tokenizer": ("tokenizer.json",),
    "tokenizer_config": ("tokenizer_config.json",),
    "generation_config": ("generation_config.json",),
    "chat_template": ("chat_template.jinja",),
}
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 16 << 20
MAX_CONTEXT_TOKENS = 4096
README_BYTES = 4096
_SHARD = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors$")


def manifest_from_transformers(folder: Path, name: str = "") -> Manifest:
    """The manifest of a model folder, its files as `file:` sources. `name`: of the model; empty: the folder's.

    Raises ConversionError for a model that is not converted here or lacks a file that is needed, OSError.
    """
    folder = folder.resolve()
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} has no config.json; name a folder in the form of a Hugging Face repository", "bad_request")
    config = read_json_object(folder / "config.json")
    task = task_of(config)
    facts = _FACTS[task](folder, config)
    files = _files(folder, task)
    values = {
        "name": name or _name(folder),
        "task": task,
        "format": "transformers",
        "licence": _licence(folder),
        "summary": f"{model_type_of(config)} from {folder.name}",
        "files": {role: {"source": f"file:{path}"} for role, path in files.items()},
        # Weights in float32, and what comes and goes while they are used.
        "memory_mb": 64 + 2 * sum(path.stat().st_size for path in files.values()) // 1_000_000,
        task: facts,
    }
    try:
        return manifest_from_mapping(values)
    except ManifestError as error:
        raise ConversionError(f"{folder}: {error}", "bad_request") from error


def _detection(folder: Path, config: JsonObject) -> dict[str, Any]:
    if not (folder / "preprocessor_config.json").is_file():
        raise ConversionError(
            f"{folder} has no preprocessor_config.json, which says how pictures are prepared; fetch it too", "bad_request"
        )
    detector = DETECTORS[model_type_of(config)]
    picture = picture_of(read_json_object(folder / "preprocessor_config.json"))
    resize, height, width = _size(picture, detector.takes_any_size)
    labels, scores = list(labels_of(config)), detector.scores
    mean, std = list(picture.mean), list(picture.std)
    facts = {"height": height, "width": width, "resize": resize, "mean": mean, "std": std, "labels": labels, "scores": scores}
    return {**facts, "multiple_of": detector.multiple_of} if resize == "shortest_edge" else facts


def _size(picture: Picture, takes_any_size: bool) -> tuple[Literal["stretch", "shortest_edge"], int, int]:
    if picture.resize == "stretch" or takes_any_size:
        return picture.resize, picture.height, picture.width
    # One size for all pictures: that of a landscape photograph, 4:3.
    return "stretch", picture.height, min(picture.width, round(picture.height * 4 / 3))


def _classification(folder: Path, config: JsonObject) -> dict[str, Any]:
    labels = labels_of(config)
    if len(labels) < 2 or config.text("problem_type", "") not in ("", "single_label_classification"):
        raise unsupported(f"{folder}: only one class out of several is told; this model has {len(labels)} and does something else")
    return {"labels": list(labels), "max_tokens": _tokens(folder, config)}


def _embedding(folder: Path, config: JsonObject) -> dict[str, Any]:
    modules = _modules(folder)
    strange = modules - {"Transformer", "Pooling", "Normalize"}
    if strange:
        raise unsupported(f"{folder}: modules.json names {', '.join(sorted(strange))}; of these modules nothing is computed here")
    facts: dict[str, Any] = {"dimensions": dimensions_of(config), "max_tokens": _tokens(folder, config), "pooling": _pooling(folder)}
    # Vectors of a bare encoder are compared by their angles.
    return {**facts, "normalise": not modules or "Normalize" in modules}


def _generation(folder: Path, config: JsonObject) -> dict[str, Any]:
    return {"context_tokens": min(config.integer("max_position_embeddings", MAX_CONTEXT_TOKENS), MAX_CONTEXT_TOKENS), **_drawing(folder)}


def _drawing(folder: Path) -> dict[str, float]:
    """How its authors draw its answers, for requests that do not say. What lies outside of what a request may ask for is left out."""
    path = folder / "generation_config.json"
    stated = read_json_object(path) if path.is_file() else JsonObject(path.name, {})
    found = {key: stated.number(key) for key in ("temperature", "top_p") if key in stated}
    most = {"temperature": 2.0, "top_p": 1.0}
    return {key: value for key, value in found.items() if 0 < value <= most[key]}


_FACTS = {"detection": _detection, "classification": _classification, "embedding": _embedding, "generation": _generation}


def _modules(folder: Path) -> set[str]:
    """Last names of the modules of a sentence-transformers model; empty for a bare encoder."""
    path = folder / "modules.json"
    if not path.is_file():
        return set()
    with path.open("rb") as file:
        # The file is a list; its objects are read with the same care as others.
        listed = json_object(b'{"modules":' + file.read(1 << 16) + b"}", "modules.json").list("modules")
    return {JsonObject("modules.json", entry).text("type").rpartition(".")[2] for entry in listed if isinstance(entry, dict)}


def _pooling(folder: Path) -> str:
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    config = read_json_object(path, "1_Pooling/config.json")
    chosen = [key for key, value in config.values.items() if key.startswith("pooling_mode_") and value is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
    if len(chosen) != 1 or chosen[0] not in known:
        raise unsupported(f"{folder}: pooling {', '.join(chosen) or 'unnamed'} is not computed here; {', '.join(known)} are")
    return known[chosen[0]]


def _tokens(folder: Path, config: JsonObject) -> int:
    most, path = tokens_of(config), folder / "sentence_bert_config.json"
    return min(most, read_json_object(path).integer("max_seq_length", most)) if path.is_file() else most


def _files(folder: Path, task: str) -> dict[str, Path]:
    found = {role: next((folder / name for name in names if (folder / name).is_file()), None) for role, names in FILES.items()}
    files = {role: path for role, path in found.items() if path is not None}
    if "model" not in files:
        raise ConversionError(f"{folder} has none of {', '.join(FILES['model'])}; fetch the weights too", "bad_request")
    if task != "detection" and "tokenizer" not in files:
        raise ConversionError(
            f"{folder} has no tokenizer.json; write one with transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            "bad_request",
        )
    if files["model"].name != INDEX:
        return files
    if task != "generation":
        raise unsupported(f"{folder}: weights in shards are read for language models only; save the model again in one file")
    return {**files, **_shards(folder)}


def _shards(folder: Path) -> dict[str, Path]:
    weights = read_json_object(folder / INDEX, INDEX, MAX_INDEX_BYTES).object("weight_map").values
    names = sorted({str(name) for name in weights.values()})
    for name in names:
        if not _SHARD.match(name) or not (folder / name).is_file():
            raise ConversionError(f"{folder}: {INDEX} names {name!r}, which is not a file beside it; fetch all shards")
    return {f"shard_{number}": folder / name for number, name in enumerate(names, 1)}


def _name(folder: Path) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", folder.name.lower()).strip("-._")[:63]
    if not NAME.match(name):
        raise ConversionError(f"the folder {folder} gives no name for a model; name one", "bad_request")
    return name


def _licence(folder: Path) -> str:
    """What the model card's front matter says. https://huggingface.co/docs/hub/model-cards"""
    path = folder / "README.md"
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            found = re.search(r"^license:\s*([A-Za-z0-9.+-]{1,64})\s*$", file.read(README_BYTES), re.MULTILINE)
        if found:
            return found.group(1)
    return "LicenseRef-unknown"
