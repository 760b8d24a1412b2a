"""`hotspare models list|pull|show|verify|rm`: the catalogue and what of it lies on this device."""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table

from agent.known_models import KnownModels, own_manifests
from models.catalog import Catalog, CatalogError
from models.durable import StoreError
from models.manifest import Manifest
from models.record import to_mapping
from models.sources import SourceError, base_name, fetch
from models.store import Store, megabytes, open_store
from models.upkeep import remove, repair, usage, verify

FILE_WIDTH = 200  # where no terminal says how wide it is: a line for each model
SUMMARY_WIDTH = 110  # a narrower terminal would fold the summaries into towers


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("models", help="list, fetch, check and remove models")
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="the node's store (default: HOTSPARE__MODELS__STORE, its state folder, or the user's own)",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="the models this device knows, and which it has")
    listing.add_argument("--json", action="store_true")
    pull = actions.add_parser("pull", help="fetch the files of models; converting them is `hotspare convert`")
    pull.add_argument("names", nargs="+", metavar="NAME")
    show = actions.add_parser("show", help="all facts about one model, as JSON")
    show.add_argument("name", metavar="NAME")
    check = actions.add_parser("verify", help="read the files of one model, or the whole store, again and name damaged ones")
    check.add_argument("name", metavar="NAME", nargs="?")
    check.add_argument("--repair", action="store_true", help="remove what is damaged; it is fetched or built again when it is needed")
    removal = actions.add_parser("rm", help="remove a model's engines and files")
    removal.add_argument("name", metavar="NAME")
    removal.add_argument("--forget", action="store_true", help="also forget the digests of the first fetch, and a manifest made by convert")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    actions = {"list": _list, "pull": _pull, "show": _show, "verify": _verify, "rm": _remove}
    try:
        store = open_store(arguments.state)
        catalog = KnownModels(store.root).catalog
        return actions[arguments.action](arguments, catalog, store)
    except (CatalogError, SourceError, StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _list(arguments: argparse.Namespace, catalog: Catalog, store: Store) -> int:
    manifests = [catalog.manifests[name] for name in sorted(catalog.manifests)]
    if arguments.json:
        print(json.dumps([_summary(manifest, store) for manifest in manifests], indent=1))
    else:
        console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=FILE_WIDTH)
        columns = ("model", "task", "files", "engines", "licence", "what it is")
        table = Table(box=None, pad_edge=False)
        for column in columns if console.width >= SUMMARY_WIDTH else columns[:-1]:
            table.add_column(column, overflow="fold", no_wrap=column in ("model", "task"))
        for manifest in manifests:
            facts = _summary(manifest, store)
            files = f"{facts['files_here']}/{facts['files']}"
            row = (manifest.name, manifest.task, files, str(facts["engines"]), manifest.licence, manifest.summary)
            table.add_row(*map(escape, row[: len(table.columns)]))
        console.print(table)
        used = usage(store)
        console.print(
            f"{megabytes(used.artefact_bytes)} of files, {megabytes(used.engine_bytes)} of engines and {megabytes(used.measured_bytes)} "
            f"of measurements in {store.root}",
            soft_wrap=True,
        )
    for problem in catalog.problems.values():
        print(f"not used: {problem}", file=sys.stderr)
    return 0


def _summary(manifest: Manifest, store: Store) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "aliases": list(manifest.aliases),
        "task": manifest.task,
        "format": manifest.format,
        "licence": manifest.licence,
        "summary": manifest.summary,
        "files": len(manifest.files),
        "files_here": sum(store.find(file) is not None for file in manifest.files.values()),
        "engines": len(store.engines(manifest.name)),
    }


def _pull(arguments: argparse.Namespace, catalog: Catalog, store: Store) -> int:
    manifests = [catalog.find(name) for name in arguments.names]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        for manifest in manifests:
            for role, file in manifest.files.items():
                is_here = store.find(file) is not None
                bar = bars.add_task(f"{manifest.name} {base_name(file)}", total=file.size_bytes or None)
                path = fetch(file, store, partial(_advance, bars, bar))
                bars.remove_task(bar)
                print(f"{manifest.name} {role}: {path}{' (was here)' if is_here else ''}", flush=True)
    return 0


def _advance(bars: Progress, bar: TaskID, done: int, total: int) -> None:
    bars.update(bar, completed=done, total=total or None)


def _show(arguments: argparse.Namespace, catalog: Catalog, store: Store) -> int:
    manifest = catalog.find(arguments.name)
    facts = to_mapping(manifest)
    for role, file in manifest.files.items():
        path = store.find(file)
        facts["files"][role]["path"] = None if path is None else str(path)
        facts["files"][role]["recorded_sha256"] = store.recorded_sha256(file.source)
    facts["engines"] = [{"folder": str(engine.folder), **to_mapping(engine.record)} for engine in store.engines(manifest.name)]
    print(json.dumps(facts, indent=1))
    return 0


def _verify(arguments: argparse.Namespace, catalog: Catalog, store: Store) -> int:
    manifest = catalog.find(arguments.name) if arguments.name else None
    checked: list[Path] = []
    damages = verify(store, manifest, checked.append)
    for damage in damages:
        print(f"{damage.kind}: {damage.path}: {damage.detail}", file=sys.stderr)
    print(f"{len(checked)} files and engines read, {len(damages)} damaged")
    if not arguments.repair or not damages:
        return 1 if damages else 0
    stayed = repair(store, damages)
    for path in stayed:
        print(f"in use: {path}; stop the node, then repair again", file=sys.stderr)
    print("what was damaged is removed" if not stayed else f"{len(stayed)} could not be removed")
    return 1 if stayed else 0


def _remove(arguments: argparse.Namespace, catalog: Catalog, store: Store) -> int:
    manifest = catalog.find(arguments.name)
    freed = remove(store, manifest, catalog.manifests.values(), arguments.forget)
    own = own_manifests(store.root) / f"{manifest.name}.toml"
    if arguments.forget and own.exists():  # made of a file that somebody pointed at, by whom it can be made again
        own.unlink()
    print(f"{manifest.name}: {megabytes(freed)} freed")
    return 0
