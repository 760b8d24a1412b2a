"""ONNX → checked and optimised ONNX. The source is untrusted: nothing is loaded before its references are known to stay inside."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

from converters.errors import ConversionError, unsupported
from converters.graph_contract import Stateless, check_contract

# Part of the engine key: raise it with every change that changes what is written.
VERSION = 1
MAX_GRAPH_BYTES = (2 << 30) - 1
MIN_OPSET = 7
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
# Constant folding would turn a table of int8 weights into one of float32: such a graph stays as it is.
MAX_GROWTH = 1.2
# Larger models get their weights in a file of their own, which the runtime maps; a graph alone must stay below 2 GiB.
EXTERNAL_FROM_BYTES = 1 << 28

log = logging.getLogger(__name__)


def onnx_from_onnx(
    source: Path,
    external: Mapping[str, Path],
    scratch: Path,
    folder: Path,
    manifest: Stateless,
) -> Path:
    """Write `folder`/model.onnx; returns the source as laid out in `scratch`, under its own names, to compare with.

    `external`: files that the model may refer to, by name. Raises ConversionError.
    """
    used = check_model(source, external, manifest)
    # Copies: of links, soft or hard, the checker takes neither.
    shutil.copyfile(source, scratch / "model.onnx")
    for name in used:
        shutil.copyfile(external[name], scratch / name)
    _run_checker(scratch / "model.onnx", source.name)
    target = folder / "model.onnx"
    size = sum(path.stat().st_size for path in scratch.iterdir())
    # What lay outside the graph stays outside; without this the written graph would point to where the source's weights lie.
    _optimise(scratch / "model.onnx", target, writes_external=bool(used) or size > EXTERNAL_FROM_BYTES)
    written = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    if written > size * MAX_GROWTH + (1 << 20):
        log.info("optimised graph is %d bytes against %d; the source's own graph is kept", written, size)
        for path in folder.glob("model.onnx*"):
            path.unlink()
        shutil.copyfile(source, target)
        for name in used:
            shutil.copyfile(external[name], folder / name)
    return scratch / "model.onnx"


def check_model(source: Path, external: Mapping[str, Path], manifest: Stateless) -> set[str]:
    """The names of the external files that the model refers to. Raises ConversionError for a model that must not be loaded."""
    size = source.stat().st_size
    if size > MAX_GRAPH_BYTES:
        raise ConversionError(f"{source.name} has {size} bytes; a graph has less than 2 GiB, its weights go to an external file")
    try:
        model = onnx.load(str(source), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ConversionError(f"{source.name} is not an ONNX model: {error}; fetch it again and compare its sha256") from error
    if not model.graph.node:
        raise ConversionError(f"{source.name} has no nodes; it is not an ONNX model")
    _check_operator_sets(model, source.name)
    check_contract(model, manifest)
    return {_external_name(tensor, external, source.name) for tensor in _tensors(model) if tensor.data_location == tensor.EXTERNAL}


def _check_operator_sets(model: Any, name: str) -> None:
    newest = onnx.defs.onnx_opset_version()
    for operators in model.opset_import:
        if operators.domain not in DOMAINS:
            raise unsupported(f"{name} uses operators of the domain {operators.domain!r}, which no runtime here has")
        if operators.domain in ("", "ai.onnx") and not MIN_OPSET <= operators.version <= newest:
            raise unsupported(f"{name} uses opset {operators.version}; {MIN_OPSET} to {newest} are read here: export it again within them")


def _external_name(tensor: Any, external: Mapping[str, Path], source: str) -> str:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location = str(facts.get("location", ""))
    path = PurePosixPath(location)
    if len(path.parts) != 1 or location in (".", "..") or "\\" in location or "\0" in location:
        raise ConversionError(f"{source}: tensor {tensor.name!r} lies in {location!r}; only a file beside the model may be named")
    if location not in external:
        raise ConversionError(f"{source}: tensor {tensor.name!r} lies in {location!r}, which the manifest does not list; add it to [files]")
    try:
        offset, length = int(facts.get("offset", "0")), int(facts.get("length", "0"))
    except ValueError as error:
        raise ConversionError(f"{source}: tensor {tensor.name!r} has the place {facts}, which is not one") from error
    size = external[location].stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        raise ConversionError(f"{source}: tensor {tensor.name!r} lies at {offset}..{offset + length} of {location}, which has {size} bytes")
    return location


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of the model: weights, attributes, those of subgraphs and functions."""
    nodes = [node for function in model.functions for node in function.node]
    graphs = [model.graph, *(info.initialization for info in model.training_info), *(info.algorithm for info in model.training_info)]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes.extend(graph.node)
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            continue
        for attribute in nodes.pop().attribute:
            graphs.extend([attribute.g] if attribute.HasField("g") else [])
            graphs.extend(attribute.graphs)
            yield from [attribute.t] if attribute.HasField("t") else []
            yield from attribute.tensors
            for sparse in (*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []), *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def _run_checker(path: Path, name: str) -> None:
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # the checker's own error, and plain ones of its C++ side
        raise ConversionError(f"{name} does not pass the ONNX checker: {error}") from error


def _optimise(source: Path, target: Path, writes_external: bool) -> None:
    options = onnxruntime.SessionOptions()
    # The levels above bind a graph to the instruction set of the machine that wrote it.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.intra_op_num_threads = 1
    if writes_external:
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{target.name}.data")
    try:
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no parent
        raise ConversionError(f"ONNX Runtime cannot load the model: {error}", "unsupported") from error
