"""`hotspare convert MODEL`: fetch, convert and verify a model for this device, as the node would; the verdict is printed."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from agent.protocol.operations import BuildPrecision, Target

if TYPE_CHECKING:
    from agent.config import Settings
    from agent.preparation import Built
    from models.manifest import Manifest
    from models.store import Store

CANCELLED = 130
COLUMNS = ("{task.description}", "{task.fields[phase]}")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("convert", help="make a model ready for this device and prove it equal to its source")
    parser.add_argument(
        "model", metavar="MODEL",
        help="a name of `hotspare models list`, a .gguf or .onnx file, a Hugging Face folder, or hf:owner/repository[@revision][/file]",
    )  # fmt: skip
    parser.add_argument("fields", metavar="FIELD=VALUE", nargs="*", help="what a file does not tell of its model: detection.height=640")
    parser.add_argument("--name", default="", help="what a model that is given by its path will be called (default: as its file)")
    parser.add_argument("--precision", choices=get_args(BuildPrecision), help="where the ladder begins that ends with fp32")
    parser.add_argument("--target", choices=get_args(Target), help="the runtime that will open the engine")
    parser.add_argument("--calibration", type=Path, metavar="PATH", help="folder of pictures or text file: for int8 and for the proof")
    parser.add_argument("--accept-unverified", action="store_true", help="publish an engine that is not proven, marked as such")
    parser.add_argument("--python", type=Path, metavar="PATH", help="the interpreter that has TensorRT (default: worker.python)")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the node's configuration: its store, interpreter and [convert]")
    parser.add_argument("--json", action="store_true", help="print the engine's record")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Pointed:
    """What was pointed at. `is_new`: its manifest was made just now and is kept once the model is converted."""

    manifest: Manifest
    is_new: bool


def run(arguments: argparse.Namespace) -> int:
    from agent.config import ConfigurationError, load_settings
    from agent.preparation import PreparationFailed
    from converters.errors import ConversionError
    from models.catalog import CatalogError
    from models.durable import StoreError
    from models.sources import SourceError
    from models.store import open_store

    errors = Console(stderr=True)
    try:
        settings = load_settings(arguments.config)
        store = open_store(settings.models.store or settings.node.state)
        pointed = _pointed(arguments, store, errors)
        built = _convert(arguments, settings, store, pointed, errors)
    except KeyboardInterrupt:
        built = None
    except PreparationFailed as error:
        _print_ladder(Console(), error.verdict)
        errors.print(f"[red]error:[/red] {_plain(error)}", highlight=False, soft_wrap=True)
        return 1
    except (CatalogError, ConfigurationError, ConversionError, SourceError, StoreError, OSError) as error:
        errors.print(f"[red]error:[/red] {_plain(error)}", highlight=False, soft_wrap=True)
        return 1
    if built is None:
        errors.print("cancelled; nothing was published")
        return _left(CANCELLED)
    _print(arguments, pointed.manifest.name, built)
    return 0


def _pointed(arguments: argparse.Namespace, store: Store, errors: Console) -> Pointed:
    from agent.known_models import KnownModels
    from converters.errors import ConversionError
    from converters.manifest_from_hub import is_hub, manifest_from_hub
    from converters.manifest_from_path import manifest_from_path, parse_given
    from models.catalog import SHIPPED
    from models.sources import fetch

    text, catalog = arguments.model, KnownModels(store.root).catalog
    given = dict(map(parse_given, arguments.fields))
    path = Path(text).expanduser()
    is_path = os.sep in text or path.suffix.lower() in (".gguf", ".onnx") or (path.is_dir() and text not in catalog.manifests)
    if not is_hub(text) and not is_path:
        if given or arguments.name:
            raise ConversionError(f"{text} is in the catalogue, where its facts are written; change them there", "bad_request")
        return Pointed(catalog.find(text), is_new=False)
    if is_hub(text):
        with errors.status(f"fetching {text}"):
            manifest = manifest_from_hub(text, store, lambda file: fetch(file, store), arguments.name, given)
    else:
        manifest = manifest_from_path(path, arguments.name, given)
    if not arguments.name and (SHIPPED / f"{manifest.name}.toml").exists():
        raise ConversionError(f"{manifest.name} is the name of a model that comes with hotspare; give this one another with --name")
    return Pointed(manifest, is_new=True)


def _convert(arguments: argparse.Namespace, settings: Settings, store: Store, pointed: Pointed, errors: Console) -> Built | None:
    """None: cancelled by a signal."""
    import anyio

    from agent.known_models import own_manifests
    from converters.manifest_from_path import manifest_toml
    from models.durable import write_atomically

    manifest = pointed.manifest
    present = {store.find(file) for file in manifest.files.values()}
    built: Built | None = None
    columns = (TextColumn(COLUMNS[0]), BarColumn(), TaskProgressColumn(), TextColumn(COLUMNS[1]), TimeElapsedColumn())
    try:
        with Progress(*columns, console=errors) as progress:
            bar = progress.add_task(manifest.name, total=1.0, phase="")

            def show(phase: str, fraction: float, message: str = "") -> None:
                progress.update(bar, completed=fraction, phase=escape(f"{phase}: {message}" if message else phase))

            built = anyio.run(_prepare, arguments, settings, store, manifest, show)
            if built is not None:
                progress.update(bar, completed=1.0, phase="done")
    finally:
        if built is None and pointed.is_new:  # the copies of what was pointed at
            for path in {store.find(file) for file in manifest.files.values()} - present - {None}:
                store.discard(Path(str(path)))
    if built is not None and pointed.is_new:
        write_atomically(own_manifests(store.root) / f"{manifest.name}.toml", manifest_toml(manifest).encode())
    return built


async def _prepare(arguments: argparse.Namespace, settings: Settings, store: Store, manifest: Manifest, show: Any) -> Built | None:
    import anyio

    from agent.build_choice import choices
    from agent.preparation import PreparationFailed
    from agent.prepare import build_first, build_settings
    from agent.runtimes import look_around

    worker = {"python": arguments.python, "threads": arguments.threads}
    settings = settings.model_copy(
        update={"worker": settings.worker.model_copy(update={name: value for name, value in worker.items() if value is not None})}
    )
    order = {"precision": arguments.precision, "target": arguments.target, "accept_unverified": arguments.accept_unverified}
    built: Built | None = None
    failure: PreparationFailed | None = None

    async def stop_on_signal() -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                tasks.cancel_scope.cancel()
                return

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_on_signal)
        try:
            machine, provider = await look_around(settings.worker.python), settings.worker.provider
            wanted = choices(settings.convert, order, machine, manifest, arguments.calibration, provider)
            built = await build_first(store, build_settings(settings), wanted, manifest, show)
        except PreparationFailed as error:  # carried out of the task group, which would wrap it
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return built


def _print(arguments: argparse.Namespace, name: str, built: Built) -> None:
    console = Console()
    if arguments.json:
        console.print_json(data=dict(built.record))
        return
    from rich.table import Table

    from agent.model_view import ladder_of

    verdict, key = built.record["verdict"], built.record["key"]
    table = Table(
        "figure", "value", "limit", title=f"{name}: {'the same model' if verdict['passed'] else 'NOT proven to be the same model'}"
    )
    for figure, value in verdict["figures"].items():
        limit = verdict.get("tolerance", {}).get(figure)
        table.add_row(figure, f"{value:.6g}", "" if limit is None else f"{limit:g}")
    console.print(table)
    if len(verdict.get("attempts", ())) > 1 or not verdict["passed"]:
        _print_ladder(console, verdict)
    elif notes := next((attempt.notes for attempt in ladder_of(verdict) if attempt.notes), ""):
        console.print(notes, highlight=False, markup=False)
    console.print(
        f"{key['runtime']} {key['runtime_version']}, {verdict.get('precision', key['precision'])}, on {key['device']}", highlight=False
    )
    console.print(f"engine: {built.folder}", highlight=False, soft_wrap=True)


def _print_ladder(console: Console, verdict: Mapping[str, Any]) -> None:
    """What was tried, and the first tensor of each attempt that left its reference."""
    from rich.markup import escape
    from rich.table import Table

    from agent.model_view import ladder_of

    attempts = ladder_of(verdict)
    if not attempts:
        return
    table = Table()
    for column in ("attempt", "outcome", "why", "first wrong tensor", "what was done"):
        table.add_column(column, overflow="fold")
    for attempt in attempts:
        table.add_row(*map(escape, (attempt.precision, attempt.status, attempt.reason, attempt.worst, attempt.notes)))
    console.print(table)


def _plain(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))


def _left(status: int) -> int:
    """A download may wait for its network in a thread that nobody can end, and the interpreter for that."""
    if threading.active_count() > 1:
        sys.stderr.flush()
        os._exit(status)
    return status
