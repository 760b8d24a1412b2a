"""A manifest for a model that somebody points at: a GGUF or ONNX file, or a folder in the form of Hugging Face.

Everything that the files tell is read out of them; what they do not tell can be given as `table.field`, and is asked for by its name.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.decoder_from_gguf import decoder_from_gguf
from converters.errors import ConversionError, unsupported
from converters.gguf import read_gguf
from converters.manifest_from_onnx import facts_from_onnx
from converters.manifest_from_transformers import manifest_from_transformers
from models.durable import sha256_of
from models.manifest import NAME, Manifest, ManifestError, manifest_from_mapping
from models.record import to_mapping

MAX_CONTEXT_TOKENS = 4096
UNKNOWN_LICENCE = "LicenseRef-unknown"
# What each task needs that a file may not tell.
NEEDED = {
    "detection": ("height", "width", "labels"),
    "embedding": ("dimensions", "max_tokens"),
    "classification": ("labels", "max_tokens"),
    "generation": ("context_tokens",),
}


def manifest_from_path(path: Path, name: str = "", given: Mapping[str, Any] | None = None) -> Manifest:
    """The manifest, its files as `file:` sources with their digests. `name`: of the model; empty: made of the file's. `given`: fields by
    their names in the manifest, such as `detection.height`, which win over what was read.

    Raises ConversionError (code `bad_request` for what has to be given), OSError.
    """
    path = path.resolve()
    if path.is_dir():
        values = to_mapping(manifest_from_transformers(path, name))
        files = {role: Path(entry["source"].partition(":")[2]) for role, entry in values["files"].items()}
    else:
        values = _facts(path)
        files = values["files"]
        values["name"] = name or model_name(path.stem)
    values["files"] = {role: _file(file) for role, file in files.items()}
    for field, value in (given or {}).items():
        _give(values, field, value)
    return _checked(values, path)


def model_name(text: str) -> str:
    """A model's name out of that of a file. Raises ConversionError where it has no letter that a name may have."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:63]
    if not NAME.match(name):
        raise ConversionError(f"{text!r} gives no name for a model; give one", "bad_request")
    return name


def parse_given(text: str) -> tuple[str, Any]:
    """`detection.height=640` → (`detection.height`, 640); the value as in TOML, or a text as it stands. Raises ConversionError."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    field, sign, value = text.partition("=")
    if not sign or not re.match(r"^[a-z_]+(\.[a-z0-9_]+)?$", field.strip()):
        raise ConversionError(f"{text!r} is not FIELD=VALUE with a field of the manifest, such as detection.height=640", "bad_request")
    try:
        return field.strip(), tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return field.strip(), value.strip()


def manifest_toml(manifest: Manifest) -> str:
    """The manifest as a file of the catalogue."""
    values = to_mapping(manifest)
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in values.items() if isinstance(value, dict) and key != "files"}
    tables.update({f"files.{role}": file for role, file in values["files"].items()})
    blocks = ["\n".join(f"{key} = {_toml(value)}" for key, value in plain.items())]
    blocks += [f"[{name}]\n" + "\n".join(f"{key} = {_toml(value)}" for key, value in table.items()) for name, table in tables.items()]
    return "\n\n".join(blocks) + "\n"


def _facts(path: Path) -> dict[str, Any]:
    kinds = {".gguf": _gguf, ".onnx": facts_from_onnx}
    kind = kinds.get(path.suffix.lower())
    if kind is None or not path.is_file():
        raise ConversionError(f"{path} is no .gguf or .onnx file and no folder with a config.json", "bad_request")
    return {"licence": UNKNOWN_LICENCE, "summary": f"from {path.name}", **kind(path)}


def _gguf(path: Path) -> dict[str, Any]:
    gguf = read_gguf(path)
    decoder = decoder_from_gguf(gguf)
    licence = gguf.text("general.license", "")
    return {
        "task": "generation",
        "format": "gguf",
        "licence": licence if re.match(r"^[A-Za-z0-9.+-]{1,64}$", licence) else UNKNOWN_LICENCE,
        "summary": f"{gguf.text('general.name', '') or decoder.architecture} from {path.name}"[:200],
        "files": {"model": path},
        "memory_mb": 64 + path.stat().st_size * 5 // 4_000_000,
        "generation": {"context_tokens": min(decoder.context_tokens, MAX_CONTEXT_TOKENS)},
    }


def _file(path: Path) -> dict[str, Any]:
    if re.search(r"\s", str(path)):
        raise ConversionError(f"{str(path)!r} has a space, which no source in a manifest may have; move the model", "bad_request")
    return {"source": f"file:{path}", "sha256": sha256_of(path), "size_bytes": path.stat().st_size}


def _give(values: dict[str, Any], field: str, value: Any) -> None:
    table, dot, name = field.partition(".")
    if not dot:
        values[table] = value
    elif table in ("build", values["task"]):
        values[table] = {**values.get(table, {}), name: value}
    else:
        raise ConversionError(
            f"{field} is no field of a {values['task']} manifest; its tables are build and {values['task']}", "bad_request"
        )


def _checked(values: dict[str, Any], path: Path) -> Manifest:
    task = values["task"]
    missing = [f"{task}.{name}" for name in NEEDED[task] if not values.get(task, {}).get(name)]
    if missing:
        raise ConversionError(
            f"{path.name} does not tell {' and '.join(missing)}; give each as FIELD=VALUE"
            + (f", or write the names of the classes into {path.parent / 'labels.txt'}" if f"{task}.labels" in missing else ""),
            "bad_request",
        )
    if task != "detection" and values["format"] != "gguf" and "tokenizer" not in values["files"]:
        raise unsupported(f"{path.name} has no tokenizer.json beside it, without which no text can be given to it; put it there")
    try:
        return manifest_from_mapping(values)
    except ManifestError as error:
        raise ConversionError(f"{path.name}: {error}", "bad_request") from error


def _toml(value: Any) -> str:
    """JSON's spelling of texts, numbers, flags and lists is TOML's too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
