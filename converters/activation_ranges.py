"""How large the values of a graph become on representative inputs: what int8 scales are made of.

Entropy after Migacz, "8-bit Inference with TensorRT" (GTC 2017): of all thresholds the one whose 128 levels tell least of the histogram
away. Least error instead takes the threshold with the least mean square error; of DEIMv2-Femto on 64 pictures of COCO it kept most
(docs/proven.md). Values are folded into histograms as they come, so memory does not grow with the number of inputs.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from converters.errors import ConversionError
from converters.graph import read_graph, save_graph
from models.durable import sha256_of, write_atomically
from models.manifest import RangeMethod as Method

Feed = Mapping[str, NDArray[Any]]

BINS = 2048
LEVELS = 128
PERCENTILE = 0.9999
# Values that are kept at once: an activation of a large detector has tens of megabytes.
TOGETHER = 48


@dataclass(frozen=True)
class Range:
    """Values are represented between `low` and `high`, what lies beyond is clipped; `peak`: the largest magnitude that was seen."""

    low: float
    high: float
    peak: float


def activation_ranges(
    graph: Path, names: Sequence[str], inputs: Sequence[Feed], method: Method, threads: int = 2, cache: Path | None = None
) -> dict[str, Range]:
    """Range of each named value. `cache`: a folder that keeps them by graph, inputs and method. Raises ConversionError."""
    if not inputs:
        raise ConversionError("ranges of int8 need at least one input; give a folder of pictures or a text file", "bad_request")
    place = None if cache is None else cache / f"{_digest(graph, names, inputs, method)}.json"
    kept = None if place is None else _read(place, names)
    if kept is not None:
        return kept
    ranges: dict[str, Range] = {}
    for start in range(0, len(names), TOGETHER):
        ranges.update(_ranges(graph, names[start : start + TOGETHER], inputs, method, threads))
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, json.dumps({name: [each.low, each.high, each.peak] for name, each in ranges.items()}).encode())
    return ranges


def _ranges(graph: Path, names: Sequence[str], inputs: Sequence[Feed], method: Method, threads: int) -> dict[str, Range]:
    with tempfile.TemporaryDirectory() as folder:
        session = _session(graph, names, Path(folder), threads)
        extremes = [(np.inf, -np.inf)] * len(names)
        for values in _run(session, names, inputs):
            # np.minimum and np.maximum hand on what is no number.
            extremes = [
                (np.minimum(low, each.min()), np.maximum(high, each.max())) for (low, high), each in zip(extremes, values, strict=True)
            ]
        peaks = [float(np.maximum(-low, high)) for low, high in extremes]
        wrong = [name for name, peak in zip(names, peaks, strict=True) if not np.isfinite(peak)]
        if wrong:
            raise ConversionError(f"the model itself gives values without bounds at {wrong[0]!r}; it cannot be made int8", "not_finite")
        bounds = peaks
        if method != "minmax":
            histograms = [np.zeros(BINS, np.int64) for _ in names]
            for values in _run(session, names, inputs):
                for histogram, peak, each in zip(histograms, peaks, values, strict=True):
                    histogram += np.histogram(np.abs(each), BINS, (0.0, peak or 1.0))[0]
            bounds = [peak * _BINS_KEPT[method](histogram) / BINS for histogram, peak in zip(histograms, peaks, strict=True)]
    return {
        name: Range(max(float(low), -float(bound)), min(float(high), float(bound)), float(peak))
        for name, (low, high), bound, peak in zip(names, extremes, bounds, peaks, strict=True)
    }


def entropy_bins(histogram: NDArray[np.int64]) -> int:
    """How many of the lowest bins to keep so that `LEVELS` levels over them diverge least from the histogram (Kullback-Leibler)."""
    counts = histogram.astype(np.float64)
    # Zeros behind a Relu say nothing of where to end.
    counts[0] = counts[1]
    best, best_divergence = len(counts), np.inf
    for kept in range(LEVELS, len(counts) + 1, 16):
        reference = counts[:kept].copy()
        level = np.arange(kept) * LEVELS // kept
        filled = np.bincount(level, reference > 0, LEVELS)
        shares = np.bincount(level, reference, LEVELS) / np.maximum(filled, 1)
        found = np.where(reference > 0, shares[level], 0)
        reference[-1] += counts[kept:].sum()
        has = reference > 0
        if not has.any() or not found.sum():
            continue
        expected, given = reference[has] / reference.sum(), np.maximum(found[has] / found.sum(), 1e-12)
        divergence = float(np.sum(expected * np.log(expected / given)))
        if divergence < best_divergence:
            best, best_divergence = kept, divergence
    return best


def least_error_bins(histogram: NDArray[np.int64]) -> int:
    """How many of the lowest bins to keep so that rounding what is below and clipping what is above has the least mean square error."""
    counts = histogram.astype(np.float64)
    counts[0] = 0
    middles = np.arange(len(counts)) + 0.5
    errors = []
    choices = range(LEVELS, len(counts) + 1, 16)
    for kept in choices:
        step = kept / LEVELS
        rounded = np.minimum(np.rint(middles / step), LEVELS - 1) * step
        errors.append(float(np.sum(counts * (middles - rounded) ** 2)))
    return choices[int(np.argmin(errors))]


def percentile_bins(histogram: NDArray[np.int64]) -> int:
    """How many of the lowest bins hold all but a ten-thousandth of the values."""
    return int(np.searchsorted(np.cumsum(histogram), PERCENTILE * histogram.sum())) + 1


_BINS_KEPT: Mapping[str, Callable[[NDArray[np.int64]], int]] = {
    "entropy": entropy_bins,
    "percentile": percentile_bins,
    "least_error": least_error_bins,
}


def _session(graph: Path, names: Sequence[str], folder: Path, threads: int) -> Any:
    model = read_graph(graph).model
    given = {value.name for value in (*model.graph.output, *model.graph.input)}
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in given)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(save_graph(model, folder / "model.onnx")), options, providers=["CPUExecutionProvider"])


def _run(session: Any, names: Sequence[str], inputs: Sequence[Feed]) -> Iterator[list[NDArray[Any]]]:
    fed = {value.name for value in session.get_inputs()}
    for feed in inputs:
        computed = dict(zip(asked, session.run(asked, dict(feed)), strict=True)) if (asked := [n for n in names if n not in fed]) else {}
        yield [np.asarray(feed[name] if name in fed else computed[name]) for name in names]


def _digest(graph: Path, names: Sequence[str], inputs: Sequence[Feed], method: Method) -> str:
    digest = hashlib.sha256(f"{sha256_of(graph)} {method} {BINS} {PERCENTILE}\0{chr(0).join(names)}".encode())
    for feed in inputs:
        for name in sorted(feed):
            digest.update(f"{name}{feed[name].shape}{feed[name].dtype}".encode())
            digest.update(np.ascontiguousarray(feed[name]).data)
    return digest.hexdigest()


def _read(place: Path, names: Sequence[str]) -> dict[str, Range] | None:
    try:
        held = {str(name): Range(*map(float, values)) for name, values in json.loads(place.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return held if set(held) == set(names) else None
