"""The node's latest events for people: bounded, newest last. What must not be lost goes through the outbox instead."""

from __future__ import annotations

from collections import deque
from datetime import datetime, timezone

from agent.http.collaborators import EventView

KEPT = 200


class History:
    def __init__(self) -> None:
        self._events: deque[EventView] = deque(maxlen=KEPT)
        self._number = 0

    def add(self, kind: str, severity: str, message: str) -> None:
        self._number += 1
        at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._events.append(EventView(self._number, at, kind, severity, message))

    @property
    def events(self) -> tuple[EventView, ...]:
        return tuple(self._events)
