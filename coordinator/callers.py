"""Which calls may change something where no token is asked for: no page of another site, whatever name it gave this address. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit


def refusal(method: str, headers: Mapping[str, str], own_host: str, has_token: bool) -> tuple[int, str] | None:
    """Status and reason where a call that changes something is refused. `own_host`: the address of the configuration.

    A form or a script of another site cannot send JSON without asking first, and is not answered. A name that its owner turned to this
    address (DNS rebinding) makes his page one of ours to the browser: only names that cannot be turned pass, which are plain addresses,
    `localhost` and the configured one. A token says it all: no other page has it.
    """
    if method in ("POST", "PUT") and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        return 415, "send JSON, with Content-Type: application/json"
    if has_token:
        return None
    host, origin = headers.get("host", ""), headers.get("origin")
    if not _cannot_be_turned(host, own_host):
        return (
            403,
            f"without a token, orders are taken at a plain address or localhost only, not at {host[:120]!r}; configure [http] token_file",
        )
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        return 403, f"without a token, no orders are taken from a page of {origin[:120]!r}; configure [http] token_file"
    return None


def _cannot_be_turned(host: str, own_host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name and name in ("localhost", own_host.lower()):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
