"""`hotspare run`: the node itself, as systemd starts it; `hotspare check-config`: would it start?"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

from agent import log
from agent.config import EXIT_CONFIGURATION, ConfigurationError, load_settings

logger = logging.getLogger(__name__)


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
        return _refuse(error)
    import anyio

    from agent.main import StartError, run_node

    try:
        return _left(anyio.run(run_node, settings, arguments.config))
    except ConfigurationError as error:
        return _refuse(error)
    except StartError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except Exception:  # a part failed that nobody expected to: systemd starts the node again, people find the trace
        logger.critical("the node ends, for a part of it failed", exc_info=True)
        return _left(1)


def check(arguments: argparse.Namespace) -> int:
    """Everything that `run` asks of the configuration, so that what passes here does not fail there; and that each camera can
    be, without which `run` would go on."""
    from agent.cameras.configured import configured, refuse_bad_cameras
    from agent.preflight import checked
    from models.catalog import load_catalog

    try:
        settings = checked(load_settings(arguments.config), load_catalog())
        refuse_bad_cameras(configured(settings).pipelines)
    except ConfigurationError as error:
        return _refuse(error)
    sys.stdout.write(settings.model_dump_json(indent=2) + "\n")
    return 0


def _refuse(error: ConfigurationError) -> int:
    sys.stderr.write(f"configuration: {error}\n")
    return EXIT_CONFIGURATION


def _left(status: int) -> int:
    """All is closed by now; but a download may wait for its network in a thread that nobody can end, and the interpreter for that."""
    if threading.active_count() > 1:
        logging.shutdown()
        os._exit(status)
    return status
