"""The command line: `hotspare run|demo|coordinator|models|detect|convert|fleet|check-config`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

# Each module has `add_parser(subparsers)`, which sets `run(arguments) -> exit status`. Their heavy imports wait for `run`.
COMMANDS = (
    "agent.commands.run",
    "agent.commands.demo",
    "agent.commands.coordinator",
    "agent.commands.models",
    "agent.commands.convert",
    "agent.commands.detect",
    "agent.commands.fleet",
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hotspare", description="A hot spare for a cloud AI API, on an edge device.")
    parser.add_argument("--version", action="version", version=f"hotspare {version('hotspare')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(name).add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = build_parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        return 141


if __name__ == "__main__":
    sys.exit(main())
