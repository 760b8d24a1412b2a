"""`hotspare detect photo.jpg holiday/ street.mp4`: what is in these pictures and films?"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.commands.detect_files import DetectError

if TYPE_CHECKING:
    from models.manifest import DetectionManifest
    from models.store import Store

GENERAL = "deimv2-femto"
SHIPPED = "conveyor-detr"
BUILD_S = 1800.0
THREADS = 2


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("detect", help="find objects in pictures and films")
    parser.add_argument("inputs", type=Path, nargs="+", metavar="FILE", help="JPEG, PNG, WebP, a film, or a folder of them")
    parser.add_argument("--model", metavar="NAME", help=f"detection model (default: {GENERAL} where it is to be had, else {SHIPPED})")
    parser.add_argument("--threshold", type=_share, metavar="T", help="least score, 0 to 1 (default: the model's)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write all with boxes here: pictures as JPEG, films as MP4")
    parser.add_argument("--out", type=_drawn, metavar="FILE", help="write the one picture or film with boxes here, .jpg or .mp4")
    parser.add_argument("--json", action="store_true", help="print JSON, a line for each picture or frame, instead of words")
    parser.add_argument("--every", type=_count, default=1, metavar="N", help="of a film look at every Nth frame only")
    parser.add_argument("--fps", type=_rate, metavar="F", help="of a film look at F frames a second at most")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """0: all was looked at; 1: something could not be, and standard error says what; 130: interrupted."""
    from agent.commands.detect_look import look_at_all
    from agent.preparation import PreparationFailed
    from models.catalog import CatalogError
    from models.durable import StoreError
    from models.engines import EngineError
    from models.sources import SourceError

    try:
        return look_at_all(arguments, lambda: engine_of(arguments.model), THREADS)
    except (DetectError, CatalogError, EngineError, PreparationFailed, SourceError, StoreError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or 'the store'}: {error.strerror or error}\n")
        return 1


def engine_of(name: str | None) -> tuple[DetectionManifest, Path]:
    """The manifest and the folder of the converted model; fetches and converts what is not there yet."""
    import anyio

    from agent.build_choice import BuildChoice
    from agent.prepare import BuildSettings, prepare_model
    from models.manifest import DetectionManifest
    from models.store import open_store

    store = open_store()
    manifest = _manifest(name, store)
    if not isinstance(manifest, DetectionManifest):
        from models.catalog import load_catalog

        names = ", ".join(sorted(each.name for each in load_catalog().manifests.values() if each.task == "detection"))
        raise DetectError(f"{manifest.name} is a model for {manifest.task}; for detection there are {names}")
    settings = BuildSettings(threads=THREADS, timeout_s=BUILD_S)
    built = anyio.run(prepare_model, store, settings, BuildChoice(), manifest, lambda phase, fraction, message="": None)
    return manifest, built.folder


def _manifest(name: str | None, store: Store) -> Any:
    from models.catalog import load_catalog
    from models.sources import SourceError, fetch

    catalog = load_catalog()
    general = catalog.manifests.get(GENERAL)
    if name is None and general is not None and (os.environ.get("HOTSPARE_MIRROR") or all(map(store.find, general.files.values()))):
        try:
            for file in general.files.values():
                fetch(file, store)
        except SourceError as error:
            sys.stderr.write(f"{GENERAL} is not to be had ({error}); using {SHIPPED}, which knows parcels, bottles and balls on a belt\n")
        else:
            name = GENERAL
    return catalog.find(name or SHIPPED)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _drawn(text: str) -> Path:
    if Path(text).suffix.lower() not in (".jpg", ".jpeg", ".mp4"):
        raise argparse.ArgumentTypeError(f"{text}: what is drawn is a JPEG, or an MP4 of a film; name it .jpg or .mp4")
    return Path(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1000")
    return value
