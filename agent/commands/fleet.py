"""`hotspare fleet ls|show|send|watch`: the operator's side of the coordinator's HTTP API."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

DEFAULT_URL = "http://127.0.0.1:8090"
POLL_S = 0.3


class FleetError(Exception):
    """The coordinator did not do what was asked; the message says why and what to do."""


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
    watch = actions.add_parser("watch", help="print events as they come, until interrupted")
    watch.add_argument("--once", action="store_true", help="print the latest events and end")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    console = Console()
    actions = {"ls": _list, "show": _show, "send": _send, "watch": _watch}
    try:
        with _client(arguments.coordinator, arguments.token_file) as client:
            return actions[arguments.action](client, arguments, console)
    except FleetError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {safe(str(error))}", highlight=False)
        return 1


def _client(url: str, token_file: Path | None) -> httpx.Client:
    try:
        token = token_file.read_text().strip() if token_file else ""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=url, headers=headers, timeout=10.0, trust_env=False)
    except (OSError, ValueError) as error:  # an unreadable file, a token that is not ASCII
        raise FleetError(f"the token cannot be used: {error}; give --token-file FILE") from error
    except httpx.InvalidURL as error:
        raise FleetError(f"{url!r} is not a URL: {error}; give --coordinator http://HOST:PORT") from error


def safe(text: str) -> str:
    """What a node or a coordinator says, for a terminal: no control characters, and brackets are no markup."""
    return escape("".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text))


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


def _ask(client: httpx.Client, method: str, path: str, **options: Any) -> Any:
    try:
        answer = client.request(method, path, **options)
    except httpx.HTTPError as error:
        raise FleetError(f"no coordinator at {client.base_url}: {error}; give --coordinator URL or set HOTSPARE_COORDINATOR") from error
    try:
        body = answer.json()
    except ValueError as error:
        text = answer.text[:200]
        raise FleetError(f"{method} {path}: HTTP {answer.status_code}: {text!r}: is {client.base_url} a coordinator?") from error
    if not answer.is_success:
        detail = body.get("detail") if isinstance(body, dict) else body
        raise FleetError(f"{method} {path}: HTTP {answer.status_code}: {detail}")
    return body


def _list(client: httpx.Client, arguments: argparse.Namespace, console: Console) -> int:
    fleet = _ask(client, "GET", "/fleet")
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
    console.print_json(data=_ask(client, "GET", f"/fleet/{quote(arguments.node, safe='')}"))
    return 0


def _send(client: httpx.Client, arguments: argparse.Namespace, console: Console) -> int:
    body = {"op": arguments.op, "args": parse_arguments(arguments.args), "deadline_s": arguments.deadline}
    sent = _ask(client, "POST", f"/fleet/{quote(arguments.node, safe='')}/commands", json=body)
    if not sent["is_sent"]:
        console.print("the coordinator has no broker now; the order waits for it within its deadline", highlight=False)
    last, ends_s = None, time.monotonic() + arguments.deadline + 10  # the coordinator closes it before
    while time.monotonic() < ends_s:
        command = _ask(client, "GET", f"/commands/{sent['id']}")
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
        for event in _ask(client, "GET", "/events", params={"after": after}):
            after = event["number"]
            data = json.dumps(event.get("data", {}))
            console.print(f"{event['ts']} {event['node']} {event['class']} {data}", highlight=False, markup=False, soft_wrap=True)
        if arguments.once:
            return 0
        try:
            time.sleep(1.0)
        except KeyboardInterrupt:
            return 0
