"""`hotspare convert MODEL`: fetch, convert and verify a model, as the node would; the verdict is printed."""

from __future__ import annotations

import argparse
from typing import Any

import anyio
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("convert", help="make a model ready for this device and prove it equal to its source")
    parser.add_argument("model", help="a name of `hotspare models list`")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the engine's record")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from agent.prepare import prepare_model
    from agent.reconcile import PreparationFailed
    from models.catalog import CatalogError, load_catalog
    from models.durable import StoreError
    from models.store import open_store

    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[phase]}"), TimeElapsedColumn())
    try:
        manifest = load_catalog().find(arguments.model)
        store = open_store()
        with Progress(*columns, console=errors) as progress:
            bar = progress.add_task(manifest.name, total=1.0, phase="")

            async def prepare() -> Any:
                def show(phase: str, fraction: float) -> None:
                    progress.update(bar, completed=fraction, phase=phase)

                return await prepare_model(store, arguments.threads, 7200.0, manifest, show)

            built = anyio.run(prepare)
            progress.update(bar, completed=1.0, phase="done")
    except (CatalogError, StoreError, PreparationFailed) as error:
        errors.print(f"[red]error:[/red] {error}", highlight=False)
        return 1
    if arguments.json:
        Console().print_json(data=dict(built.record))
        return 0
    verdict = built.record["verdict"]
    table = Table("figure", "value", title=f"{manifest.name}: {'the same model' if verdict['passed'] else 'not the same model'}")
    for name, value in verdict["figures"].items():
        table.add_row(name, f"{value:.6g}")
    Console().print(table)
    Console().print(f"engine: {built.folder}", highlight=False, soft_wrap=True)
    return 0
