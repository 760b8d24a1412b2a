"""Questions to a coordinator's HTTP API, and its answers fit for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from rich.markup import escape

DEFAULT_URL = "http://127.0.0.1:8090"


class FleetError(Exception):
    """The coordinator did not do what was asked; the message says why and what to do."""


def fleet_client(url: str, token_file: Path | None) -> httpx.Client:
    try:
        token = token_file.read_text().strip() if token_file else ""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=url, headers=headers, timeout=10.0, trust_env=False)
    except (OSError, ValueError) as error:  # an unreadable file, a token that is not ASCII
        raise FleetError(f"the token cannot be used: {error}; give --token-file FILE") from error
    except httpx.InvalidURL as error:
        raise FleetError(f"{url!r} is not a URL: {error}; give --coordinator http://HOST:PORT") from error


def of_node(node: str) -> str:
    """The path of one node, whatever is in its name."""
    return f"/fleet/{quote(node, safe='')}"


def ask(client: httpx.Client, method: str, path: str, **options: Any) -> Any:
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


def safe(text: str) -> str:
    """What a node or a coordinator says, for a terminal: no control characters, and brackets are no markup."""
    return escape("".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text))
