"""`hotspare fleet apply`: a desired document for some nodes, one after another; the first that does not get there ends it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from agent.commands.fleet_client import FleetError, ask, of_node, safe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

POLL_S = 0.5


def apply_document(client: httpx.Client, arguments: argparse.Namespace, console: Console) -> int:
    """Raises FleetError where a node refuses it or has not got there by its deadline; those after it were not told."""
    document = read_document(arguments.file)
    nodes = list(arguments.nodes)
    if arguments.all:
        nodes += [node["node"] for node in ask(client, "GET", "/fleet")["nodes"] if node["is_online"] and node["node"] not in nodes]
    if not nodes:
        raise FleetError("no node is named, or none is online; give names, or --all")
    for number, node in enumerate(nodes, 1):
        seen = max((event["number"] for event in ask(client, "GET", "/events", params={"limit": 1})), default=0)
        wanted = ask(client, "PUT", f"{of_node(node)}/desired", json=document)
        words = "" if wanted["is_sent"] else "; the coordinator has no broker now, and sends it when it is back"
        console.print(f"{safe(node)} ({number} of {len(nodes)}): revision {wanted['rev']}{words}", highlight=False)
        if arguments.deadline > 0:
            try:
                _wait(client, node, wanted["rev"], seen, arguments.deadline, console)
            except FleetError as error:
                rest = f"; not told: {', '.join(nodes[number:])}" if nodes[number:] else ""
                raise FleetError(f"{error}{rest}") from error
    return 0


def read_document(file: Path) -> dict[str, Any]:
    """The document of a TOML or JSON file. Raises FleetError."""
    try:
        text = file.read_text()
        document = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise FleetError(f"{file} cannot be read as {'JSON' if file.suffix == '.json' else 'TOML'}: {error}") from error
    if not isinstance(document, dict):
        raise FleetError(f"{file} holds no document with models and pipelines")
    return document


def _wait(client: httpx.Client, node: str, revision: int, seen: int, deadline_s: float, console: Console) -> None:
    ends_s, last, waits_for = time.monotonic() + deadline_s, "", ""
    while time.monotonic() < ends_s:
        events = ask(client, "GET", "/events", params={"after": seen} if seen else {})
        seen = max((event["number"] for event in events), default=seen)
        for event in events:
            data = event.get("data", {})
            if (event["node"], event["class"], event["sev"], data.get("rev")) == (node, "desired", "error", revision):
                raise FleetError(f"{node}: revision {revision} {data.get('message')}")
        state = ask(client, "GET", of_node(node))["state"] or {}
        if state.get("applied_rev", 0) >= revision:
            console.print(f"  [green]applied[/green] by {safe(node)}", highlight=False)
            return
        waits_for = _waits_for(state) if state.get("desired_rev", 0) >= revision else "not taken yet"
        if waits_for != last:
            last = waits_for
            console.print(f"  {safe(waits_for)}", highlight=False)
        time.sleep(POLL_S)
    raise FleetError(f"{node} has not applied revision {revision} within {deadline_s:g} s: {waits_for}")


def _waits_for(state: dict[str, Any]) -> str:
    """What does not run yet, in words."""
    parts = (("models", "name", "serving"), ("pipelines", "id", "running"))
    waiting = [
        f"{part[name]} {part['status']}" + (f": {part['message']}" if part.get("message") else "")
        for kind, name, good in parts
        for part in state.get(kind, ())
        if part["status"] != good
    ]
    return ", ".join(waiting) or "taken"
