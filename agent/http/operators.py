"""Who may give orders to this node over HTTP: whoever holds a key; without keys this machine only, and not through a balancer on it."""

from __future__ import annotations

import ipaddress

from fastapi import Request

from agent.http.collaborators import Services
from agent.http.errors import ApiError

FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


def refuse_strangers(services: Services, request: Request) -> None:
    """Raises ApiError. Keys themselves were asked for at the door (agent/http/front.py)."""
    if not services.keys() and not _is_local(request):
        raise ApiError(
            403, "orders are taken from this machine only, for this node has no API keys; set http.keys_file", type_="permission_error",
            code="not_allowed",
        )  # fmt: skip


def _is_local(request: Request) -> bool:
    if request.client is None or any(name in request.headers for name in FORWARDED):
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
