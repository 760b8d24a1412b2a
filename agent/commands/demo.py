"""`hotspare demo`: the whole product on one machine, on real weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import anyio
from rich.console import Console
from rich.markup import escape


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("demo", help="start broker, coordinator, balancer, a stand-in cloud API and a node on this machine")
    parser.add_argument("--state", type=Path, metavar="FOLDER", help="where the demo keeps its models and logs")
    parser.add_argument("--video", type=Path, metavar="FILE", help="with HOTSPARE_MIRROR: watch this video with deimv2-femto")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from agent.demo.programs import ProgramError
    from agent.demo.stage import run_demo

    console = Console()
    try:
        return anyio.run(run_demo, arguments.state, arguments.video, console)
    except ProgramError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
