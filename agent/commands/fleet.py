"""`hotspare fleet ls|show|send|watch`: the operator's side of the coordinator's HTTP API."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from agent.commands.fleet_apply import apply_document
from agent.commands.fleet_client import DEFAULT_URL, FleetError, ask, fleet_client, of_node, safe

POLL_S = 0.3


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("fleet", help="look at and command the nodes of a coordinator")
    parser.add_argument("--coordinator", metavar="URL", default=os.environ.get("HOTSPARE_COORDINATOR", DEFAULT_URL))
    parser.add_argument("--token-file", type=Path, help="file with the coordinator's token, if it asks for one")
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("ls", help="list the nodes")
    listing.add_argument("--json", action="store_true")
    show = actions.add_parser("show", help="everything known of one node, as JSON")
    show.add_argument("node")
    send = actions.add_parser("send", help="send one command and wait for its final result")
    send.add_argument("node")
    send.add_argument("op", help="ping, drain, standby, activate, model.deploy, model.remove, pipeline.start, pipeline.stop, …")
    send.add_argument(
        "args", nargs="*", default=[], metavar="NAME=VALUE", help="arguments; a value is JSON where it parses as JSON, else text"
    )
    send.add_argument("--deadline", type=float, default=30.0, metavar="SECONDS")
    apply = actions.add_parser("apply", help="say what models and pipelines nodes are to have, one node after another, and wait for each")
    apply.add_argument("file", type=Path, help='TOML or JSON: models = ["…"], [[pipelines]] with id, source, model, settings')
    apply.add_argument("nodes", nargs="*", metavar="NODE")
    apply.add_argument("--all", action="store_true", help="every node that is online, in the order of their names")
    apply.add_argument("--deadline", type=float, default=600.0, metavar="SECONDS", help="for one node; 0: do not wait (default: 600)")
    watch = actions.add_parser("watch", help="print events as they come, until interrupted")
    watch.add_argument("--once", action="store_true", help="print the latest events and end")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    console = Console()
    actions = {"ls": _list, "show": _show, "send": _send, "apply": apply_document, "watch": _watch}
    try:
        with fleet_client(arguments.coordinator, arguments.token_file) as client:
            return actions[arguments.action](client, arguments, console)
    except FleetError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {safe(str(error))}", highlight=False)
        return 1


def parse_arguments(words: list[str]) -> dict[str, Any]:
    """`name=value` words to a mapping. Raises FleetError for a word without `=`."""
    values: dict[str, Any] = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator or not name:
            raise FleetError(f"argument {word!r} is not NAME=VALUE")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def _list(client: httpx.Client, arguments: argparse.Namespace, console: Console) -> int:
    fleet = ask(client, "GET", "/fleet")
    if arguments.json:
        console.print_json(data=fleet)
        return 0
    primary = fleet["primary"]
    probe = primary["last_probe"]
    words = f"{probe['reason']}, {probe['latency_ms']:.0f} ms" if probe else "not probed yet"
    console.print(f"primary: {'[red]down[/red]' if primary['is_down'] else '[green]up[/green]'} ({safe(words)})", highlight=False)
    for subject, problem in fleet["problems"].items():
        console.print(f"[red]{safe(subject)}:[/red] {safe(problem)}", highlight=False)
    table = Table("node", "online", "mode", "lease", "epoch", "serving")
    for node in fleet["nodes"]:
        online = "[green]yes[/green]" if node["is_online"] else f"[red]no[/red] ({safe(node['presence'])})"
        mode = node["mode"] + (" (drained)" if node["is_drained"] else "")
        table.add_row(node["node"], online, mode, node["lease"] or "–", str(node["epoch"]), ", ".join(node["models"]) or "–")
    console.print(table)
    return 0


def _show(client: httpx.Client, arguments: argparse.Namespace, console: Console) -> int:
    console.print_json(data=ask(client, "GET", of_node(arguments.node)))
    return 0


def _send(client: httpx.Client, arguments: argparse.Namespace, console: Console) -> int:
    body = {"op": arguments.op, "args": parse_arguments(arguments.args), "deadline_s": arguments.deadline}
    sent = ask(client, "POST", f"{of_node(arguments.node)}/commands", json=body)
    if not sent["is_sent"]:
        console.print("the coordinator has no broker now; the order waits for it within its deadline", highlight=False)
    last, ends_s = None, time.monotonic() + arguments.deadline + 10  # the coordinator closes it before
    while time.monotonic() < ends_s:
        command = ask(client, "GET", f"/commands/{sent['id']}")
        result = command["result"] or {}
        step = (command["status"], result.get("step"), result.get("progress"))
        if step != last:
            last = step
            progress = f" {result['progress']:.0%}" if result.get("progress") is not None else ""
            console.print(safe(f"{command['status']}{progress} {result.get('step') or ''}".rstrip()), highlight=False)
        if command["is_final"]:
            if result.get("error"):
                raise FleetError(f"{arguments.op} on {arguments.node}: {result['error']['code']}: {result['error']['message']}")
            if result.get("output"):
                console.print_json(data=result["output"])
            if command["status"] != "succeeded":
                raise FleetError(f"{arguments.op} on {arguments.node}: {command['status']}")
            return 0
        time.sleep(POLL_S)
    raise FleetError(f"no final result of {sent['id']} within {arguments.deadline:g} s; `hotspare fleet show {arguments.node}` tells more")


def _watch(client: httpx.Client, arguments: argparse.Namespace, console: Console) -> int:
    after = 0
    while True:
        for event in ask(client, "GET", "/events", params={"after": after}):
            after = event["number"]
            data = json.dumps(event.get("data", {}))
            console.print(f"{event['ts']} {event['node']} {event['class']} {data}", highlight=False, markup=False, soft_wrap=True)
        if arguments.once:
            return 0
        try:
            time.sleep(1.0)
        except KeyboardInterrupt:
            return 0
