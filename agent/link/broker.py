"""What a connection is given and what it gives: values and errors, without the library behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


class LinkLost(ConnectionError):
    """The connection is gone or never came; the caller's loop reconnects. The message says why."""


class PublishRefused(Exception):
    """The broker will not take this publication (ACL, size, quota): sending it again would not help."""


@dataclass(frozen=True, slots=True)
class Broker:
    """Where and as whom to connect. Secrets are paths, read at each connect so that rotation needs no restart."""

    host: str
    port: int
    client_id: str
    username: str | None = None
    password_file: Path | None = None
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    uses_tls: bool = False
    keepalive_s: int = 30
    session_expiry_s: int = 3600
    receive_maximum: int = 20
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Will:
    topic: str
    payload: bytes
    delay_s: int = 10
    expiry_s: int = 7 * 86_400


@dataclass(frozen=True, slots=True)
class Received:
    """One publication. `expiry_left_s` is what the broker left of the Message Expiry: the age without any clock (R6)."""

    topic: str
    payload: bytes
    is_retained: bool
    expiry_left_s: int | None = None
    properties: Mapping[str, str] = field(default_factory=dict)
    message_id: int = 0
    qos: int = 0
