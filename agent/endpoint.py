"""Where the balancer reaches this node: as configured, else the address that leads to the broker."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

from agent.config import Settings
from agent.protocol.messages import Endpoint

WILDCARDS = ("0.0.0.0", "::")


def own_names(settings: Settings) -> frozenset[str]:
    """What this node is called by its own configuration, in small letters."""
    http = settings.http
    advertised = http.advertise.rpartition(":")[0].strip("[]")
    return frozenset(name.lower() for name in (http.host, advertised, *http.names) if name)


def configured_endpoint(settings: Settings, port: int) -> Endpoint | None:
    """`port` is the one that was bound. None: the node listens on all addresses, and only the network knows which one is meant."""
    if settings.http.advertise:
        host, _, given = settings.http.advertise.rpartition(":")
        return Endpoint(host=host.strip("[]"), port=int(given))
    return None if settings.http.host in WILDCARDS else Endpoint(host=settings.http.host, port=port)


def routed_endpoint(settings: Settings, port: int) -> Endpoint | None:
    """Our address on the way to the broker; None while there is no way. Resolves a name: blocks."""
    with suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(settings.mqtt.host, settings.mqtt.port, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)  # sends nothing: only asks for the route
                return Endpoint(host=str(probe.getsockname()[0]).partition("%")[0], port=port)
    return None


def page_url(endpoint: Callable[[], Endpoint | None]) -> str:
    """Where people reach the node's page; empty while nobody knows."""
    at = endpoint()
    if at is None:
        return ""
    host = f"[{at.host}]" if ":" in at.host else at.host
    return f"http{'s' if at.tls else ''}://{host}:{at.port}/"
