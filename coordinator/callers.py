"""Which calls may change something where no token is asked for: no page of another site, whatever name it gave this address. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from agent.http.hosts import can_be_turned, is_of_another_page


def refusal(method: str, headers: Mapping[str, str], own_host: str, has_token: bool) -> tuple[int, str] | None:
    """Status and reason where a call that changes something is refused. `own_host`: the address of the configuration.

    A form or a script of another site cannot send JSON without asking first, and is not answered. A name that its owner turned to this
    address (DNS rebinding) makes his page one of ours to the browser: only names that cannot be turned pass (agent/http/hosts.py), and
    the configured one. A token says it all: no other page has it.
    """
    if method in ("POST", "PUT") and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        return 415, "send JSON, with Content-Type: application/json"
    if has_token:
        return None
    host, origin = headers.get("host", ""), headers.get("origin")
    if can_be_turned(host, (own_host.lower(),)):
        return (
            403,
            f"without a token, orders are taken at plain addresses and local names, not at {host[:120]!r}; configure [http] token_file",
        )
    if is_of_another_page(host, origin):
        return 403, f"without a token, no orders are taken from a page of {str(origin)[:120]!r}; configure [http] token_file"
    return None
