"""Which sensors this device has, decided once at start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.telemetry.generic import Generic, Reading
from agent.telemetry.jetson import Jetson, is_jetson


def open_sensors(root: Path = Path("/")) -> Callable[[], Reading]:
    """A function that reads them all. It blocks for some milliseconds: call it in a thread, or seldom."""
    return Jetson(root).read if is_jetson(root) else Generic(root).read
