"""`hotspare coordinator`: the reference control plane of a fleet."""

from __future__ import annotations

import argparse
import sqlite3
import sys
from pathlib import Path
from typing import Any

from agent import log
from agent.config import EXIT_CONFIGURATION


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("coordinator", help="run the coordinator: registry, probes, leases, nginx")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--verbose", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import anyio

    from coordinator.config import CoordinatorConfigError, load_coordinator_settings
    from coordinator.main import run_coordinator

    log.configure(arguments.verbose)
    try:
        settings = load_coordinator_settings(arguments.config)
    except CoordinatorConfigError as error:
        sys.stderr.write(f"configuration: {error}\n")
        return EXIT_CONFIGURATION
    try:
        anyio.run(run_coordinator, settings)
    except (OSError, ValueError, sqlite3.Error) as error:  # the address is taken, the database or the token file cannot be used
        sys.stderr.write(f"coordinator: {error}; see {arguments.config}\n")
        return 1
    return 0
