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


def drop_other_outputs(model: Any, manifest: Stateless) -> bool:
    """Take away outputs that the contract does not name, auxiliary ones of training for instance; whether there were any. What made them is
    still there."""
    wanted = _expected(manifest)[2]
    kept = [value for value in model.graph.output if value.name in wanted]
    if len(kept) == len(model.graph.output):
        return False
    del model.graph.output[:]
    model.graph.output.extend(kept)
    return True


def fix_shapes(model: Any, manifest: Stateless) -> None:
    """Write into the model's inputs what the manifest fixes: height and width where pictures are stretched, a batch of one where more is
    never asked. Raises ConversionError where the graph is fixed to something else."""
    if not isinstance(manifest, DetectionManifest):
        return
    facts = manifest.detection
    sides = [facts.height, facts.width] if facts.has_one_size else [0, 0]
    rows = 1 if manifest.build.batch_max == 1 else 0
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        wanted = {"orig_target_sizes": [rows, 2], "pixel_mask": [rows, 0, 0]}.get(value.name, [rows, 3, *sides])
        dimensions = value.type.tensor_type.shape.dim
        if value.name in weights or len(dimensions) != len(wanted):
            continue
        for dimension, size in zip(dimensions, wanted, strict=True):
            if size and dimension.dim_value not in (0, size):
                raise _broken(manifest.name, f"its input {value.name!r} has {dimension.dim_value} where {size} is needed")
            if size:
                dimension.dim_value = size
    # What was said of the shapes of outputs and in between may name what is a number now.
    del model.graph.value_info[:]
    for value in model.graph.output:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.HasField("dim_param"):
                dimension.Clear()


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
