"""Under which name a request came, and from which page, where no key is asked for. Pure.

Who owns a name may turn it to any address (DNS rebinding), and a browser then takes this node for a part of his site: his page could look
through the cameras of whoever visits it. A form of his could be sent here too, without being asked.
https://en.wikipedia.org/wiki/DNS_rebinding
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

# Names that nobody can register: RFC 6761, RFC 6762, RFC 8375, ICANN's of 2024; and what home routers use.
LOCAL = (".localhost", ".local", ".home.arpa", ".internal", ".lan")


def can_be_turned(host: str, own: Collection[str]) -> bool:
    """Whether the name of a Host header may be anybody's. Not: plain addresses, names without a dot, local ones, and `own`."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return True
    if not name or name in own:
        return not name
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." in name and not name.endswith(LOCAL)
    return False


def is_of_another_page(host: str, origin: str | None) -> bool:
    """Whether a browser sends it for a page of somebody else's: only browsers send an Origin."""
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc.lower() != host.lower()
    except ValueError:
        return True
