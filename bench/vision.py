"""Pictures: time and accuracy of our detectors against transformers' pipeline and plain ONNX Runtime with the same weights.

    python -m bench.vision --peer-python /path/to/python/with/torch [--models detr-r50 d-fine-n deimv2-femto] [--json FILE]

HOTSPARE_TEST_DATA names the folder with models/ and data/ (default: ../shared). DEIMv2-Femto has real weights: its accuracy is mAP at IoU
0.50:0.95 on 64 pictures of COCO. The others have random weights, since time does not depend on them; `largest Δ` is how far our engine's
logits and boxes are from those of torch on one input. The ways take turns, frame by frame.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime

from bench.average_precision import Found, Truth, mean_average_precision
from bench.report import QUIET_CORES, machine, percentile, report, table, undisturbed
from bench.vision_ways import ROOT, Peer, Turn, Way, interleaved, ours, plain, plainly_finished, plainly_prepared
from converters.onnx_from_onnx import onnx_from_onnx
from models.engines import EngineOptions, open_engine
from models.manifest import Detection, DetectionManifest, manifest_from_mapping
from models.pictures import Picture, decode_picture, encode_jpeg
from models.scaling import Scaler, placement_of
from models.tasks.detection import Detector

DATA = Path(os.environ.get("HOTSPARE_TEST_DATA", ROOT.parent / "shared"))
RANDOM = ("detr-r50", "rt-detr-r18", "d-fine-n")
FEMTO = "deimv2-femto"
PEER = "transformers pipeline"
PLAIN = "ONNX Runtime, plain"
FRAME = (1280, 960)


def rows_of(model: str, turns: dict[str, list[Turn]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, each in turns.items():
        kept = undisturbed(each) if len(undisturbed(each)) >= 3 else each
        middle = {key: percentile([getattr(turn, key) for turn in kept], 0.5) for key in ("ms", "pre_ms", "run_ms", "post_ms", "cpu_ms")}
        rows.append(
            {"model": model, "way": name, **middle, "looks": len(kept), "neighbours": percentile([t.neighbours for t in kept], 0.5)}
        )
    return rows


@contextmanager
def random_model(name: str, cache: Path, python: Path, threads: int) -> Iterator[tuple[dict[str, Way], float]]:
    """The ways to run a model of random weights, which is made where it is not in `cache` yet; and how far ours is from torch."""
    folder = cache / name
    if not (folder / "manifest.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([str(python), "-m", "bench.vision_peer", "save", name, str(folder)], cwd=ROOT, check=True)
    manifest = manifest_from_mapping(json.loads((folder / "manifest.json").read_text()))
    if not isinstance(manifest, DetectionManifest):
        raise SystemExit(f"{folder}/manifest.json is of a model for {manifest.task}; remove the folder, it is made anew")
    engines = built(folder / "model.onnx", manifest, cache / f"{name}-engine")
    with ExitStack() as stack:
        peer = Peer(python, folder, threads)
        stack.callback(peer.close)
        picture = camera_frame()
        ways: dict[str, Way] = {}
        for title, spinning in (("hotspare", False), ("hotspare, spinning threads", True)):
            engine = open_engine(engines, EngineOptions(threads=threads, spinning=spinning))
            stack.callback(engine.close)
            detector = Detector(engine, manifest)
            ways[title] = ours(detector)
        prepared = detector.prepare((picture,))
        expected, found = peer.outputs(picture, prepared.inputs["pixel_values"]), detector.run(prepared)
        delta = max(float(np.abs(found[key] - expected[key]).max() / np.abs(expected[key]).max()) for key in ("logits", "pred_boxes"))
        ways[PLAIN] = plain(folder / "model.onnx", manifest.detection, threads)
        ways[PEER] = peer.detect
        yield ways, delta


def built(source: Path, manifest: DetectionManifest, folder: Path) -> Path:
    """The graph as `hotspare convert` writes it."""
    for each in (folder, folder / "scratch"):
        each.mkdir(parents=True, exist_ok=True)
    onnx_from_onnx(source, {}, folder / "scratch", folder, manifest)
    return folder


def camera_frame() -> Picture:
    return np.asarray(cv2.resize(decode_picture((DATA / "data/two_cats.png").read_bytes()), FRAME, interpolation=cv2.INTER_CUBIC), np.uint8)


class Pictures:
    """The 64 pictures, decoded, with their truth."""

    def __init__(self, folder: Path) -> None:
        described = json.loads((folder / "instances.json").read_text())
        names = {each["id"]: each["name"] for each in described["categories"]}
        self.labels = tuple(names[number] for number in sorted(names))
        self.pictures: dict[int, Picture] = {}
        self.truth: dict[int, list[Truth]] = {}
        for each in described["images"]:
            self.pictures[each["id"]] = decode_picture((folder / "images" / each["file_name"]).read_bytes())
            self.truth[each["id"]] = []
        for each in described["annotations"]:
            x, y, width, height = each["bbox"]
            self.truth[each["image_id"]].append(Truth(names[each["category_id"]], (x, y, x + width, y + height), bool(each["iscrowd"])))

    def precision(self, detect: Callable[[Picture], Sequence[Found]]) -> float:
        return mean_average_precision(self.truth, {number: detect(picture) for number, picture in self.pictures.items()})


def femto(cache: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    described = Pictures(DATA / "data/coco64")
    facts = Detection(416, 416, described.labels)
    manifest = DetectionManifest(FEMTO, "Apache-2.0", "", "onnx", {}, detection=facts)
    source = DATA / "models/deimv2_hgnetv2_femto_coco_raw.onnx"
    folder = built(source, manifest, cache / f"{FEMTO}-engine")
    engines = [open_engine(folder, EngineOptions(threads=threads, spinning=spinning)) for spinning in (False, True)]
    detectors = [Detector(engine, manifest) for engine in engines]
    session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])

    def as_found(picture: Picture) -> list[Found]:
        return [Found(each.label, each.score, (each.x0, each.y0, each.x1, each.y1)) for each in detectors[0].detect(picture, 0.0)]

    def as_plain(picture: Picture) -> list[Found]:
        logits, boxes = session.run(["logits", "pred_boxes"], {"pixel_values": plainly_prepared(picture, facts)})
        return plainly_finished(logits, boxes, facts, picture, 100)

    maps = {"hotspare": described.precision(as_found), PLAIN: described.precision(as_plain)}
    ways = {"hotspare": ours(detectors[0]), "hotspare, spinning threads": ours(detectors[1]), PLAIN: plain(source, facts, threads)}
    rows = rows_of(FEMTO, interleaved(ways, camera_frame(), 10 * rounds))
    for engine in engines:
        engine.close()
    return [{**row, "map": round(maps.get(row["way"], maps["hotspare"]), 4)} for row in rows]


def picture_work(rounds: int) -> list[list[object]]:
    """CPU milliseconds on one thread: decoding, scaling, encoding."""
    frame = camera_frame()
    jpeg, square = encode_jpeg(frame), Detection(640, 640, ("a",))
    edges = Detection(800, 1333, ("a",), resize="shortest_edge", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    large, small = Scaler(edges), Scaler(square)
    place, other = (placement_of(facts, *frame.shape[:2]) for facts in (edges, square))
    work: dict[str, Callable[[], object]] = {
        "JPEG decoded": lambda: decode_picture(jpeg),
        "→ float planes 800x1066": lambda: large.planes([frame], [place], 1),
        "→ float planes 640x640": lambda: small.planes([frame], [other], 1),
        "→ bytes 640x640": lambda: small.pixels([frame], [other], 1),
        "the same written out, 800x1066": lambda: plainly_prepared(frame, edges),
        "JPEG encoded": lambda: encode_jpeg(frame),
    }
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    lines: list[list[object]] = []
    for name, do in work.items():
        do()
        times_ms = []
        for _ in range(20 * rounds):
            began_s = time.process_time()
            do()
            times_ms.append((time.process_time() - began_s) * 1000)
        lines.append([name, percentile(times_ms, 0.5)])
    cv2.setNumThreads(threads)
    return lines


def model_table(model: str, rows: Sequence[dict[str, Any]]) -> Any:
    keys = ("ms", "pre_ms", "run_ms", "post_ms", "cpu_ms", "delta", "map", "neighbours")
    lines: list[list[object]] = [[row["way"], *(row.get(key) for key in keys)] for row in rows]
    own, peers = ([row for row in rows if (row["way"] in (PLAIN, PEER)) == is_peer] for is_peer in (False, True))
    for peer, row in itertools.product(peers, own):
        ratios = [f"{peer[key] / row[key]:.2f}×" if key in ("ms", "cpu_ms") else "" for key in keys[:5]]
        lines.append([f"{peer['way']} ÷ {row['way']}", *ratios])
    lines = [line + [""] * (len(keys) + 1 - len(line)) for line in lines]
    return table(model, ["way", "frame → boxes ms", "pre", "run", "post", "CPU ms", "largest Δ", "mAP", "neighbours"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(*RANDOM, FEMTO), default=[*RANDOM, FEMTO], metavar="MODEL", help="(%(default)s)")
    parser.add_argument(
        "--peer-python", type=Path, metavar="PYTHON", help="an interpreter with torch and transformers (ours, if it has them)"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/bench-vision", help="where models are kept (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if min(given.rounds, given.threads) < 1:
        parser.error("rounds and threads are 1 at least")
    python, cache = given.peer_python or Path(sys.executable), given.cache.absolute()
    cache.mkdir(parents=True, exist_ok=True)
    found = subprocess.run([str(python), "-c", "import torch, transformers"], capture_output=True, check=False).returncode == 0
    figures: dict[str, Any] = {"bench": "vision", "machine": machine(), "threads": given.threads, "rows": []}
    notes, tables = [f"onnxruntime {version('onnxruntime')}, OpenCV {cv2.__version__}, {given.threads} threads, frames of 1280x960"], []
    for name in given.models:
        rows = []
        if name == FEMTO:
            rows = femto(cache, given.threads, given.rounds)
        elif found:
            with random_model(name, cache, python, given.threads) as (ways, delta):
                rows = rows_of(name, interleaved(ways, camera_frame(), given.rounds))
                rows = [{**row, "delta": delta} if row["way"].startswith("hotspare") else row for row in rows]
        else:
            notes.append(f"{name}: not measured, {python} has no torch and transformers; name one that has with --peer-python")
        figures["rows"] += rows
        tables += [model_table(name, rows)] if rows else []
    work = picture_work(given.rounds)
    figures["work"] = {str(name): ms for name, ms in work}
    tables.append(table("pictures of 1280x960, one thread", ["work", "CPU ms"], work))
    notes.append(f"neighbours: median of the cores that others used; looks over {QUIET_CORES} count only where fewer than 3 are below it")
    report(tables, notes, figures, given.json)


if __name__ == "__main__":
    main()
