"""What each precision costs a detector, on pictures whose boxes are known: the gate's figures, its verdict, and average precision.

    python -m bench.precision --model ../shared/models/deimv2_hgnetv2_femto_coco_raw.onnx

Graphs run through ONNX Runtime on the CPU, as they stand: what TensorRT computes from the same types differs by its order of sums.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.average_precision import Found, mean_average_precision
from bench.vision import Pictures
from converters.calibration import calibration_inputs
from converters.half_from_onnx import half_from_onnx
from converters.int8_from_onnx import int8_from_onnx
from converters.onnx_from_onnx import GraphTarget, onnx_from_onnx
from converters.verdict import Comparison
from converters.verify_onnx import open_source, verify_detection
from models.catalog import load_catalog
from models.engines import Engine
from models.manifest import DetectionManifest
from models.tasks.detection import Detector

CALIBRATED = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default="deimv2-femto", help="name in the catalog (default: %(default)s)")
    parser.add_argument("--model", type=Path, required=True, help="its ONNX file")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/coco64"), help="pictures with boxes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    manifest = load_catalog().find(asked.manifest)
    if not isinstance(manifest, DetectionManifest):
        parser.error(f"{asked.manifest} is no detector")
    described = Pictures(asked.data)
    with tempfile.TemporaryDirectory() as folder:
        graphs = rounded(manifest, asked.model, asked.data, Path(folder), asked.threads)
        print("| precision | matched boxes | p95 of score deltas | p99 | largest | gate | mAP |\n|---|---|---|---|---|---|---|")
        for name, graph in graphs.items():
            # Unoptimised: ONNX Runtime would fuse the integers of the form that TensorRT reads in another way.
            source, result = (open_source(path, asked.threads) for path in (asked.model, graph))
            gate = verify_detection(manifest, source, result, list(described.pictures.values()))
            print(row(name, gate, average_precision(described, manifest, result)), flush=True)
            source.close()
            result.close()


def rounded(manifest: DetectionManifest, model: Path, data: Path, folder: Path, threads: int) -> Mapping[str, Path]:
    """Graphs by precision, as the lines of a build write them."""
    scratch, standard = folder / "scratch", folder / "standard"
    for each in (scratch, standard):
        each.mkdir()
    onnx_from_onnx(model, {}, scratch, standard, manifest, GraphTarget(is_standard=True))
    graph, build = standard / "model.onnx", manifest.build
    inputs = calibration_inputs(manifest, graph, data / "images", count=CALIBRATED)
    cache, excluded = folder / "ranges", (*build.keeps_fp32, *build.not_int8)

    def both(path: Path) -> None:
        int8 = int8_from_onnx(graph, path, inputs, excluded=excluded, cache=cache, threads=threads)
        half_from_onnx(path, path, build.keeps_fp32, peaks=int8.peaks)

    written: Mapping[str, Callable[[Path], object]] = {
        "fp32": lambda path: shutil.copy(graph, path),
        "fp16": lambda path: half_from_onnx(graph, path, build.keeps_fp32),
        "fp16, attention and normalisation in fp32": lambda path: half_from_onnx(graph, path, build.keeps_fp32, with_attention=True),
        "int8 for TensorRT, the rest fp32": lambda path: int8_from_onnx(
            graph, path, inputs, excluded=excluded, cache=cache, threads=threads
        ),
        "int8 for TensorRT, the rest fp16": both,
        "int8 for ONNX Runtime": lambda path: int8_from_onnx(
            graph, path, inputs, excluded=excluded, form="unsigned", cache=cache, threads=threads
        ),
        "int8, nothing excluded": lambda path: int8_from_onnx(graph, path, inputs, cache=cache, threads=threads),
    }
    graphs = {name: folder / f"{index}.onnx" for index, name in enumerate(written)}
    for name, write in written.items():
        write(graphs[name])
    return graphs


def average_precision(described: Pictures, manifest: DetectionManifest, engine: Engine) -> float:
    detector = Detector(engine, manifest)
    pictures: Sequence[NDArray[np.uint8]] = list(described.pictures.values())
    found = {
        number: [Found(each.label, each.score, (each.x0, each.y0, each.x1, each.y1)) for each in detector.detect(picture, 0.0)]
        for number, picture in zip(described.pictures, pictures, strict=True)
    }
    return mean_average_precision(described.truth, found)


def row(name: str, gate: Comparison, precision: float) -> str:
    figures = gate.figures
    cells = (
        name,
        f"{figures['matched_boxes']:.3f} of {figures['compared_boxes']:.0f}",
        f"{figures['p95_score_delta']:.4f}",
        f"{figures['p99_score_delta']:.4f}",
        f"{figures['max_score_delta']:.4f}",
        "passed" if gate.passed else f"refused: {gate.reason}",
        f"{precision:.4f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
