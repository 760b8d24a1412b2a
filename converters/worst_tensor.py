"""Where does a candidate leave its source? Values that both graphs have by one name are compared in the order of computation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from converters.ladder import Rung
from converters.verdict import WorstTensor

# What rounding explains at one value; int8 keeps about two digits.
MAX_ERROR: Mapping[Rung, float] = {"fp32": 2e-3, "tf32": 1e-2, "fp16": 2e-2, "int8": 0.3, "int4": 0.5}
# Values looked at in one run: all at once would hold every activation of the network twice.
TOGETHER = 16
DEADLINE_S = 120.0
CHOICE = "TopK"

Feeds = Mapping[str, NDArray[Any]]


def worst_tensor(source: Path, candidate: Path, feeds: tuple[Feeds, Feeds], precision: Rung, threads: int = 1) -> WorstTensor | None:
    """The first value whose relative error exceeds what `precision` explains, or that holds what is no number; None if there is none.

    `feeds`: inputs of source and candidate. Both run on ONNX Runtime, unoptimised. The candidate is given the source's choices (TopK):
    rounding may swap two that are nearly alike, and then whole rows differ that are right. Looking ends after DEADLINE_S.
    """
    deadline = time.monotonic() + DEADLINE_S
    operators = _values(source)
    others = _values(candidate)
    names = [name for name in operators if name in others and name not in _choices(candidate)]
    last_good = ""
    chosen = [name for name, operator in operators.items() if operator == CHOICE and name in others and name in _choices(source)]
    given = {**feeds[1], **(_run(source, chosen, feeds[0], threads) if chosen else {})}
    for first in range(0, len(names), TOGETHER):
        together = names[first : first + TOGETHER]
        expected = _run(source, together, feeds[0], threads)
        found = _run(candidate, together, given, threads, chosen)
        for name in together:
            error = relative_error(expected[name], found[name])
            if error is None:
                continue
            if not error <= MAX_ERROR[precision]:
                return WorstTensor(name, operators[name], error if np.isfinite(error) else None, last_good)
            last_good = name
        if time.monotonic() > deadline:
            break
    return None


def relative_error(expected: NDArray[Any], found: NDArray[Any]) -> float | None:
    """‖found - expected‖ / ‖expected‖; None for values that are not compared: integers, other shapes, no numbers in the source."""
    is_floating = all(np.issubdtype(value.dtype, np.floating) for value in (expected, found))
    if not is_floating or expected.shape != found.shape or not expected.size or not np.isfinite(expected).all():
        return None
    difference = np.linalg.norm(found.astype(np.float64) - expected)
    return float(difference / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-6 * expected.size**0.5))


def _values(path: Path) -> dict[str, str]:
    """Values that the nodes of a graph make → operator, in the order of computation."""
    model = onnx.load(str(path), load_external_data=False)
    return {name: node.op_type for node in model.graph.node for name in node.output if name}


def _choices(path: Path) -> set[str]:
    """Values that hold the places of what was chosen."""
    model = onnx.load(str(path), load_external_data=False)
    return {node.output[1] for node in model.graph.node if node.op_type == CHOICE}


def _run(path: Path, names: Sequence[str], feeds: Feeds, threads: int, replaced: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """Values by name; those of `replaced` are not computed but fed."""
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        node.output[:] = [f"{name}.own" if name in replaced else name for name in node.output]
    model.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.INT64, list(feeds[name].shape)) for name in replaced)
    del model.graph.output[:]
    # Without types: the runtime tells them itself.
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    # Beside the graph, for that is where its weights are looked for.
    probe = path.with_name(f".{path.name}.probe")
    probe.write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
        wanted = {value.name for value in session.get_inputs()}
        values = session.run(list(names), {name: value for name, value in feeds.items() if name in wanted})
    finally:
        probe.unlink()
    return dict(zip(names, values, strict=True))
