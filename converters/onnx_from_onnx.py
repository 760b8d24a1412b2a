"""ONNX → checked and optimised ONNX. The source is untrusted: nothing is loaded before its references are known to stay inside."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

from converters.affine_in_layout import affine_in_layout
from converters.chosen_first import chosen_first
from converters.errors import ConversionError, unsupported
from converters.folded_onnx import folded_onnx, is_folded
from converters.graph import Graph, opset_of, read_graph, require_standard, save_graph
from converters.graph_contract import Stateless, check_contract, drop_other_outputs, fix_shapes
from converters.plain_from_quantised import is_quantised, plain_from_quantised
from converters.written_out import write_out
from models.manifest import DetectionManifest

# Part of the engine key: raise it with every change that changes what is written.
VERSION = 6
MAX_GRAPH_BYTES = (2 << 30) - 1
MIN_OPSET = 7
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
# Constant folding would turn a table of int8 weights into one of float32: such a graph stays as it is.
MAX_GROWTH = 1.2
# Larger models get their weights in a file of their own, which the runtime maps; a graph alone must stay below 2 GiB.
EXTERNAL_FROM_BYTES = 1 << 28

# Newest operator set that a parser reads, by the major version of TensorRT: 8.5 and 8.6 end with JetPack 5 and 6.0.
# https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/operators-and-opset-guide.html
OPSETS = {8: 17, 9: 19, 10: 20, 11: 25}
RTX_OPSET = 25

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphTarget:
    """Who reads the written graph.

    is_standard  only ONNX's own operators, shapes fixed as far as the manifest allows, weights dequantised: for TensorRT. Else with the
                 fused operators of ONNX Runtime.
    opset_max    newest operator set it reads; 0: whatever ONNX Runtime reads
    writes_out   operators that it has not or gets wrong, to be written out in simpler ones
    """

    is_standard: bool = False
    opset_max: int = 0
    writes_out: frozenset[str] = frozenset()


ONNXRUNTIME = GraphTarget()
# The levels above bind a graph to the instruction set of the machine that wrote it.
_FUSED = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED


def tensorrt_target(module: str, version: str) -> GraphTarget:
    """The target of the module `tensorrt` or `tensorrt_rtx` in a version such as 8.5.2.2."""
    major = int(version.split(".")[0]) if version[:1].isdigit() else 0
    if module == "tensorrt_rtx":
        return GraphTarget(is_standard=True, opset_max=RTX_OPSET)
    newest = max(OPSETS.values()) if major > max(OPSETS) else OPSETS.get(major, min(OPSETS.values()))
    # 8.5 has no LayerNormalization, and 8.6 gets that of opset 17 wrong on some devices (NVIDIA/TensorRT#3656, #3657).
    return GraphTarget(is_standard=True, opset_max=newest, writes_out=frozenset({"LayerNormalization"} if major < 9 else ()))


def onnx_from_onnx(
    source: Path,
    external: Mapping[str, Path],
    scratch: Path,
    folder: Path,
    manifest: Stateless,
    target: GraphTarget = ONNXRUNTIME,
) -> Path:
    """Write `folder`/model.onnx; returns the source as laid out in `scratch`, under its own names, to compare with.

    `external`: files that the model may refer to, by name. Raises ConversionError.
    """
    used = check_model(source, external, manifest)
    _lay_out(source, external, used, scratch)
    _prune(scratch / "model.onnx", manifest)
    if target.is_standard:
        _write_standard(scratch / "model.onnx", folder / "model.onnx", manifest, target)
    elif isinstance(manifest, DetectionManifest) and is_folded(manifest):
        inner = scratch / "folded.onnx"
        _optimise(folded_onnx(scratch / "model.onnx", inner, manifest), folder / "model.onnx", _FUSED, writes_external=bool(used))
        for path in scratch.glob("folded.onnx*"):
            path.unlink()
    else:
        _write_fused(external, used, scratch, folder, isinstance(manifest, DetectionManifest))
    if not target.is_standard and isinstance(manifest, DetectionManifest):
        affine_in_layout(folder / "model.onnx")
    return scratch / "model.onnx"


def _lay_out(source: Path, external: Mapping[str, Path], used: set[str], scratch: Path) -> None:
    # Copies: of links, soft or hard, the checker takes neither.
    shutil.copyfile(source, scratch / "model.onnx")
    for name in used:
        shutil.copyfile(external[name], scratch / name)
    _run_checker(scratch / "model.onnx", source.name)


def _prune(path: Path, manifest: Stateless) -> None:
    """Only what the contract asks for, and what is computed for it."""
    model = onnx.load(str(path), load_external_data=False)
    if drop_other_outputs(model, manifest):
        graph = Graph(model)
        graph.drop_unused()
        path.write_bytes(graph.model.SerializeToString())


def _write_fused(external: Mapping[str, Path], used: set[str], scratch: Path, folder: Path, is_detector: bool) -> None:
    target, chosen = folder / "model.onnx", scratch / "chosen.onnx"
    size = sum(path.stat().st_size for path in scratch.iterdir())
    is_whole = not used and size <= EXTERNAL_FROM_BYTES
    read = chosen if is_detector and is_whole and chosen_first(scratch / "model.onnx", chosen) else scratch / "model.onnx"
    # What lay outside the graph stays outside; without this the written graph would point to where the source's weights lie.
    _optimise(read, target, _FUSED, writes_external=not is_whole)
    chosen.unlink(missing_ok=True)
    written = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    if written > size * MAX_GROWTH + (1 << 20):
        log.info("optimised graph is %d bytes against %d; the source's own graph is kept", written, size)
        for path in folder.glob("model.onnx*"):
            path.unlink()
        shutil.copyfile(scratch / "model.onnx", target)
        for name in used:
            shutil.copyfile(external[name], folder / name)


def _write_standard(source: Path, target: Path, manifest: Stateless, reader: GraphTarget) -> None:
    """Constants folded, dead parts gone, weights as floats; nothing that only ONNX Runtime knows."""
    model = onnx.load(str(source), load_external_data=False)
    opset = opset_of(model)
    if reader.opset_max and opset > reader.opset_max:
        raise unsupported(
            f"the model of {manifest.name} has opset {opset}; the TensorRT here reads up to {reader.opset_max} "
            f"(8.5 and 8.6 of JetPack 5 and 6.0: 17): export it again with an opset of at most {reader.opset_max}"
        )
    fix_shapes(model, manifest)
    # In the source's folder, whose external weights it shares.
    fixed, folded = source.with_name("fixed.onnx"), source.with_name("folded.onnx")
    fixed.write_bytes(model.SerializeToString())
    if is_quantised(model):
        plain_from_quantised(fixed, fixed)
    if isinstance(manifest, DetectionManifest) and is_folded(manifest):
        folded_onnx(fixed, fixed, manifest)
    size = sum(path.stat().st_size for path in source.parent.iterdir())
    # A product and its bias as one Gemm between two reshapes gives TensorRT nothing.
    level, without = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC, ["MatMulAddFusion"]
    _optimise(fixed, folded, level, writes_external=size > EXTERNAL_FROM_BYTES, without=without)
    graph = read_graph(folded)
    require_standard(graph.model, "TensorRT")
    write_out(graph, reader.writes_out)
    graph.drop_unused()
    save_graph(graph.model, target)
    for path in source.parent.glob("f*ed.onnx*"):
        path.unlink()


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


def _optimise(source: Path, target: Path, level: object, writes_external: bool, without: Sequence[str] = ()) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(target)
    options.intra_op_num_threads = 1
    if writes_external:
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{target.name}.data")
    try:
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without))
    except Exception as error:  # ONNX Runtime's exceptions share no parent
        raise ConversionError(f"ONNX Runtime cannot load the model: {error}", "unsupported") from error
