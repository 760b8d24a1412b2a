"""`hotspare run`: the node itself, as systemd starts it; `hotspare check-config`: would it start?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from agent import log
from agent.config import EXIT_CONFIGURATION, ConfigurationError, load_settings


def add_parser(subparsers: Any) -> None:
    for name, summary, function in (
        ("run", "run the node until it is told to stop", run),
        ("check-config", "read the configuration, print it with all defaults, and end", check),
    ):
        parser = subparsers.add_parser(name, help=summary)
        parser.add_argument(
            "--config", type=Path, metavar="FILE", help="TOML file; HOTSPARE__SECTION__FIELD in the environment wins over it"
        )
        parser.add_argument("--verbose", action="store_true")
        parser.set_defaults(run=function)


def run(arguments: argparse.Namespace) -> int:
    log.configure(arguments.verbose)
    try:
        settings = load_settings(arguments.config)
    except ConfigurationError as error:
        sys.stderr.write(f"configuration: {error}\n")
        return EXIT_CONFIGURATION
    import anyio

    from agent.main import StartError, run_node

    try:
        return anyio.run(run_node, settings)
    except ConfigurationError as error:
        sys.stderr.write(f"configuration: {error}\n")
        return EXIT_CONFIGURATION
    except StartError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def check(arguments: argparse.Namespace) -> int:
    try:
        settings = load_settings(arguments.config)
    except ConfigurationError as error:
        sys.stderr.write(f"configuration: {error}\n")
        return EXIT_CONFIGURATION
    sys.stdout.write(settings.model_dump_json(indent=2) + "\n")
    return 0
