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
TOGETHER = 40
DEADLINE_S = 120.0
CHOICE = "TopK"

Feeds = Mapping[str, NDArray[Any]]


def worst_tensor(source: Path, candidate: Path, feeds: tuple[Feeds, Feeds], precision: Rung, threads: int = 1) -> WorstTensor | None:
    """The first value whose relative error exceeds what `precision` explains, or that holds what is no number; None if there is none.

    `feeds`: inputs of source and candidate. Both run on ONNX Runtime, unoptimised. The candidate is given the source's choices (TopK):
    rounding may swap two that are nearly alike, and then whole rows differ that are right. Looking ends after DEADLINE_S.
    """
    deadline = time.monotonic() + DEADLINE_S
    one, other = Probe(source, threads), Probe(candidate, threads)
    chosen = [name for name in one.choices if name in other.choices]
    other.replace(chosen, one.run(chosen, feeds[0]) if chosen else {})
    names = [name for name in one.operators if name in other.operators and name not in {*one.choices, *other.choices}]
    last_good = ""
    for first in range(0, len(names), TOGETHER):
        together = names[first : first + TOGETHER]
        wrong = first_wrong(together, one.operators, one.run(together, feeds[0]), other.run(together, feeds[1]), precision, last_good)
        if wrong is not None:
            return wrong
        last_good = together[-1]
        if time.monotonic() > deadline:
            break
    return None


def first_wrong(
    names: Sequence[str], operators: Mapping[str, str], expected: Feeds, found: Feeds, precision: Rung, last_good: str = ""
) -> WorstTensor | None:
    """The first of `names` whose values differ by more than `precision` explains."""
    for name in names:
        error = relative_error(expected[name], found[name])
        if error is None:
            continue
        if not error <= MAX_ERROR[precision]:
            return WorstTensor(name, operators[name], error if np.isfinite(error) else None, last_good)
        last_good = name
    return None


def relative_error(expected: NDArray[Any], found: NDArray[Any]) -> float | None:
    """‖found - expected‖ / ‖expected‖; None for values that are not compared: integers, other shapes, no numbers in the source."""
    is_floating = all(np.issubdtype(value.dtype, np.floating) for value in (expected, found))
    if not is_floating or expected.shape != found.shape or not expected.size or not np.isfinite(expected).all():
        return None
    difference = np.linalg.norm(found.astype(np.float64) - expected)
    return float(difference / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-6 * expected.size**0.5))


class Probe:
    """A graph whose inner values can be had.

    operators  value → operator that makes it, in the order of computation
    choices    values that hold the places of what was chosen
    given      values that are not computed but fed, see `replace`
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.model = onnx.load(str(path), load_external_data=False)
        self.operators: dict[str, str] = {name: node.op_type for node in self.model.graph.node for name in node.output if name}
        self.choices = [node.output[1] for node in self.model.graph.node if node.op_type == CHOICE]
        # Beside the graph, for that is where its weights are looked for.
        self._path = path.with_name(f".{path.name}.probe")
        self._threads = threads
        self.given: dict[str, NDArray[Any]] = {}

    def replace(self, names: Sequence[str], values: Feeds) -> None:
        """From now on these values are not computed but given."""
        graph = self.model.graph
        for node in graph.node:
            node.output[:] = [f"{name}.own" if name in names else name for name in node.output]
        graph.input.extend(helper.make_tensor_value_info(name, TensorProto.INT64, list(values[name].shape)) for name in names)
        self.given = dict(values)

    def run(self, names: Sequence[str], feeds: Feeds) -> dict[str, NDArray[Any]]:
        del self.model.graph.output[:]
        # Without types: the runtime tells them itself.
        self.model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        try:
            self._path.write_bytes(self.model.SerializeToString())
            session = onnxruntime.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
            wanted = {value.name for value in session.get_inputs()}
            given = {name: value for name, value in {**feeds, **self.given}.items() if name in wanted}
            return dict(zip(names, session.run(list(names), given), strict=True))
        finally:
            self._path.unlink(missing_ok=True)
