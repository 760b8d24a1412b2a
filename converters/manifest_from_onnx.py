"""A manifest for an ONNX file, from its graph and from the files that exporters leave beside it.

Read beside the model where they are: labels.txt (one class a line), config.json and preprocessor_config.json of transformers,
tokenizer.json, and the files that hold the weights.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

from converters.errors import ConversionError, unsupported
from converters.json_object import read_json_object
from converters.transformers_facts import labels_of, picture_of, tokens_of

Shapes = Mapping[str, tuple[int, ...]]

MAX_LABELS_BYTES = 1 << 20
# Where exporters put the names of the classes.
LABEL_PROPERTIES = ("labels", "names", "id2label", "classes")
TOKENIZER_FILES = {"tokenizer": "tokenizer.json", "config": "config.json"}


def facts_from_onnx(path: Path) -> dict[str, Any]:
    """task, format, files and the task's own table. Facts that nothing tells are missing; who checks the manifest names them.

    Raises ConversionError for a graph in the form of no task, OSError.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ConversionError(f"{path.name} is not an ONNX model: {error}; fetch it again and compare its sha256") from error
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: _shape(value) for value in model.graph.input if value.name not in weights}
    outputs = {value.name: _shape(value) for value in model.graph.output}
    files = {"model": path, **_external(model, path)}
    if {"images", "orig_target_sizes"} <= set(inputs) and {"labels", "boxes", "scores"} <= set(outputs):
        return _facts("detection", files, _detection(path, model, inputs["images"], "deploy", 0))
    if "pixel_values" in inputs and {"logits", "pred_boxes"} <= set(outputs):
        classes = outputs["logits"][-1] if outputs["logits"] else 0
        return _facts("detection", files, _detection(path, model, inputs["pixel_values"], "raw", classes))
    if "input_ids" in inputs:
        beside = {role: path.parent / name for role, name in TOKENIZER_FILES.items() if (path.parent / name).is_file()}
        task, table = _encoder(path, model, inputs, outputs)
        return _facts(task, {**files, **beside}, table)
    raise unsupported(
        f"{path.name} takes {', '.join(inputs) or 'nothing'} and gives {', '.join(outputs) or 'nothing'}: the form of no task here; "
        "detection is pixel_values → logits, pred_boxes, or images, orig_target_sizes → labels, boxes, scores; text is input_ids → …"
    )


def _facts(task: str, files: Mapping[str, Path], table: Mapping[str, Any]) -> dict[str, Any]:
    return {"task": task, "format": "onnx", "files": dict(files), task: dict(table)}


def _detection(path: Path, model: Any, picture: tuple[int, ...], contract: str, classes: int) -> dict[str, Any]:
    labels = _labels(path, model)
    facts: dict[str, Any] = {"contract": contract}
    if not labels and classes > 0:
        labels = tuple(str(index) for index in range(classes))
    if labels:
        facts["labels"] = list(labels)
        # One column more than names: the last one is for what is nothing, and the scores of a row add up to one.
        facts["scores"] = "softmax" if classes == len(labels) + 1 else "sigmoid"
    if len(picture) == 4 and min(picture[2:]) > 0:
        facts["height"], facts["width"] = picture[2:]
    preprocessor = path.parent / "preprocessor_config.json"
    if preprocessor.is_file():
        known = picture_of(read_json_object(preprocessor))
        sizes = {"height": known.height, "width": known.width, "resize": known.resize}
        facts = {**sizes, **facts, "mean": list(known.mean), "std": list(known.std)}
    return facts


def _encoder(path: Path, model: Any, inputs: Shapes, outputs: Shapes) -> tuple[str, dict[str, Any]]:
    length = inputs["input_ids"][-1] if inputs["input_ids"] else 0
    facts: dict[str, Any] = {"max_tokens": length} if length > 0 else {}
    config = path.parent / "config.json"
    if "max_tokens" not in facts and config.is_file():
        facts["max_tokens"] = tokens_of(read_json_object(config))
    if "logits" in outputs:
        classes = outputs["logits"][-1] if outputs["logits"] else 0
        labels = _labels(path, model) or tuple(f"LABEL_{index}" for index in range(max(0, classes)))
        return "classification", {**facts, "labels": list(labels)} if labels else facts
    states = [name for name, shape in outputs.items() if len(shape) == 3]
    if not states:
        raise unsupported(f"{path.name} gives {', '.join(outputs)}: neither logits nor a state for each token [N, T, D]")
    name = "last_hidden_state" if "last_hidden_state" in states else states[0]
    return "embedding", {**facts, "output": name, **({"dimensions": outputs[name][-1]} if outputs[name][-1] > 0 else {})}


def _labels(path: Path, model: Any) -> tuple[str, ...]:
    """Names of the classes in their order; empty where nothing tells them."""
    written = path.parent / "labels.txt"
    if written.is_file():
        with written.open("rb") as stream:
            text = stream.read(MAX_LABELS_BYTES).decode(errors="replace")
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    properties = {entry.key: entry.value for entry in model.metadata_props}
    for key in LABEL_PROPERTIES:
        names = _names(properties.get(key, "")[:MAX_LABELS_BYTES])
        if names:
            return names
    config = path.parent / "config.json"
    if config.is_file():
        facts = read_json_object(config)
        return labels_of(facts) if "id2label" in facts else ()
    return ()


def _names(text: str) -> tuple[str, ...]:
    """A list of names, or a table from numbers to names, in JSON or as Python prints it."""
    value: Any = None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        break
    if isinstance(value, dict):
        numbered = {int(key): name for key, name in value.items() if str(key).isdecimal()}
        value = [numbered[index] for index in range(len(numbered))] if sorted(numbered) == list(range(len(value))) else None
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _external(model: Any, path: Path) -> dict[str, Path]:
    """The files beside the model that hold its weights. Whether they may is checked when it is converted."""
    places = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == tensor.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    plain = sorted(place for place in places if Path(place).name == place and (path.parent / place).is_file())
    return {f"data_{number}": path.parent / place for number, place in enumerate(plain, 1)}


def _shape(value: Any) -> tuple[int, ...]:
    """-1 for a dimension that is open."""
    return tuple(dimension.dim_value or -1 for dimension in value.type.tensor_type.shape.dim)
