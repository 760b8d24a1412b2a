"""Does a graph offer what its manifest promises? Names and types of inputs and outputs, per task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnx import TensorProto

from converters.errors import ConversionError
from models.manifest import ClassificationManifest, DetectionManifest, EmbeddingManifest

_FLOATS = frozenset({TensorProto.FLOAT})
_INTEGERS = frozenset({TensorProto.INT64, TensorProto.INT32})
_ANY = frozenset({TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.FLOAT})

# Models without state between calls.
Stateless = EmbeddingManifest | ClassificationManifest | DetectionManifest

_Types = Mapping[str, frozenset[int]]


def check_contract(model: Any, manifest: Stateless) -> None:
    """Raises ConversionError for a missing or strange input, a missing output, or a type that nobody feeds or reads."""
    required, optional, outputs = _expected(manifest)
    weights = {tensor.name for tensor in model.graph.initializer}
    found = {value.name: value.type.tensor_type.elem_type for value in model.graph.input if value.name not in weights}
    given = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    for name in required:
        if name not in found:
            raise _broken(manifest.name, f"it has no input {name!r} (its inputs are {', '.join(found)})")
    for name, kind in found.items():
        allowed = required.get(name) or optional.get(name)
        if allowed is None:
            raise _broken(manifest.name, f"nobody knows what its input {name!r} means (known are {', '.join([*required, *optional])})")
        if kind not in allowed:
            raise _broken(manifest.name, f"its input {name!r} is {_type_name(kind)}, not {_type_names(allowed)}")
    for name, allowed in outputs.items():
        if name not in given:
            raise _broken(manifest.name, f"it has no output {name!r} (its outputs are {', '.join(given)})")
        # Exporters may leave an output's type open.
        if given[name] and given[name] not in allowed:
            raise _broken(manifest.name, f"its output {name!r} is {_type_name(given[name])}, not {_type_names(allowed)}")


def _expected(manifest: Stateless) -> tuple[_Types, _Types, _Types]:
    """Required inputs, optional inputs, required outputs."""
    if isinstance(manifest, DetectionManifest):
        if manifest.detection.contract == "deploy":
            inputs = {"images": _FLOATS, "orig_target_sizes": frozenset({TensorProto.INT64})}
            return inputs, {}, {"labels": _INTEGERS, "boxes": _FLOATS, "scores": _FLOATS}
        return {"pixel_values": _FLOATS}, {"pixel_mask": _ANY}, {"logits": _FLOATS, "pred_boxes": _FLOATS}
    output = manifest.embedding.output if isinstance(manifest, EmbeddingManifest) else manifest.classification.output
    return {"input_ids": _INTEGERS}, {"attention_mask": _INTEGERS, "token_type_ids": _INTEGERS}, {output: _FLOATS}


def _broken(name: str, what: str) -> ConversionError:
    return ConversionError(f"the model of {name} does not fit its manifest: {what}; correct the manifest or export the model again")


def _type_name(kind: int) -> str:
    name: str = TensorProto.DataType.Name(kind)
    return name.lower()


def _type_names(kinds: frozenset[int]) -> str:
    return " or ".join(sorted(map(_type_name, kinds)))
