"""`hotspare detect photo.jpg`: what is in this picture?"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.manifest import DetectionManifest
    from models.pictures import Picture
    from models.store import Store
    from models.tasks.detection import Detection

GENERAL = "deimv2-femto"
SHIPPED = "conveyor-detr"
BUILD_S = 1800.0
THREADS = 2


class DetectError(Exception):
    """The command cannot do what it was asked; the message says why and what to do."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("detect", help="find objects in a picture")
    parser.add_argument("picture", type=Path, help="JPEG, PNG or WebP")
    parser.add_argument("--model", metavar="NAME", help=f"detection model (default: {GENERAL} where it is to be had, else {SHIPPED})")
    parser.add_argument("--threshold", type=_share, metavar="T", help="least score, 0 to 1 (default: the model's)")
    parser.add_argument("--out", type=_jpeg, metavar="FILE", help="write the picture with boxes here, as JPEG")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from agent.preparation import PreparationFailed
    from models.catalog import CatalogError
    from models.durable import StoreError
    from models.engines import EngineError
    from models.pictures import PictureError
    from models.sources import SourceError

    try:
        _detect(arguments)
    except (DetectError, CatalogError, EngineError, PictureError, PreparationFailed, SourceError, StoreError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or arguments.picture}: {error.strerror or error}\n")
        return 1
    return 0


def _detect(arguments: argparse.Namespace) -> None:
    from models.durable import write_atomically
    from models.engines import open_engine
    from models.pictures import MAX_BYTES, decode_picture, draw_detections, encode_jpeg
    from models.store import open_store
    from models.tasks.detection import Detector

    with arguments.picture.open("rb") as stream:
        picture = decode_picture(stream.read(MAX_BYTES + 1))
    manifest, folder = _engine(arguments.model, open_store())
    engine = open_engine(folder)
    try:
        began_s = time.monotonic()
        found = Detector(engine, manifest).detect(picture, arguments.threshold)
        latency_ms = (time.monotonic() - began_s) * 1000
    finally:
        engine.close()
    if arguments.out:
        write_atomically(arguments.out, encode_jpeg(draw_detections(picture, found), 92))
    if arguments.json:
        print(json.dumps(_as_json(manifest.name, picture, found, latency_ms)))
    else:
        _print_table(manifest.name, picture, found, latency_ms, arguments.out)


def _engine(name: str | None, store: Store) -> tuple[DetectionManifest, Path]:
    """The manifest and the folder of the converted model; fetches and converts what is not there yet."""
    import anyio

    from agent.build_choice import BuildChoice
    from agent.prepare import BuildSettings, prepare_model
    from models.catalog import load_catalog
    from models.manifest import DetectionManifest
    from models.sources import SourceError, fetch

    catalog = load_catalog()
    general = catalog.manifests.get(GENERAL)
    if name is None and general is not None and (os.environ.get("HOTSPARE_MIRROR") or all(map(store.find, general.files.values()))):
        name = GENERAL
        try:
            for file in general.files.values():
                fetch(file, store)
        except SourceError as error:
            sys.stderr.write(f"{GENERAL} is not to be had ({error}); using {SHIPPED}, which knows parcels, bottles and balls on a belt\n")
            name = None
    manifest = catalog.find(name or SHIPPED)
    if not isinstance(manifest, DetectionManifest):
        names = ", ".join(sorted(each.name for each in catalog.manifests.values() if each.task == "detection"))
        raise DetectError(f"{manifest.name} is a model for {manifest.task}; for detection there are {names}")
    settings = BuildSettings(threads=THREADS, timeout_s=BUILD_S)
    built = anyio.run(prepare_model, store, settings, BuildChoice(), manifest, lambda phase, fraction: None)
    return manifest, built.folder


def _as_json(model: str, picture: Picture, found: tuple[Detection, ...], latency_ms: float) -> dict[str, Any]:
    detections = [
        {"label": each.label, "score": round(each.score, 4), "box": [round(value, 1) for value in (each.x0, each.y0, each.x1, each.y1)]}
        for each in found
    ]
    height, width = picture.shape[:2]
    return {"model": model, "width": width, "height": height, "latency_ms": round(latency_ms, 1), "detections": detections}


def _print_table(model: str, picture: Picture, found: tuple[Detection, ...], latency_ms: float, out: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    height, width = picture.shape[:2]
    table = Table("object", "score", "left", "top", "right", "bottom", title=f"{model}, {width}x{height}, {latency_ms:.0f} ms", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for each in found:
        table.add_row(each.label, f"{each.score:.1%}", *(f"{value:.0f}" for value in (each.x0, each.y0, each.x1, each.y1)))
    console = Console()
    console.print(table if found else f"{model} sees nothing it knows; try a lower --threshold", highlight=False)
    if out:
        console.print(f"boxes drawn in {out}", highlight=False)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _jpeg(text: str) -> Path:
    if Path(text).suffix.lower() not in (".jpg", ".jpeg"):
        raise argparse.ArgumentTypeError(f"{text}: the annotated picture is a JPEG; name it .jpg")
    return Path(text)
