"""Which sensors this device has, and what it is: decided once at start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.protocol.messages import Hardware
from agent.telemetry.generic import Generic, Reading, memory_mb, read_text
from agent.telemetry.jetson import Jetson, is_jetson, l4t_version, module_name

LONGEST = 128  # of a word on the wire


def open_sensors(root: Path = Path("/")) -> Callable[[], Reading]:
    """A function that reads them all. It blocks for some milliseconds: call it in a thread, or seldom."""
    return Jetson(root).read if is_jetson(root) else Generic(root).read


def hardware(root: Path = Path("/")) -> Hardware:
    """The module of a Jetson, the product name of a PC."""
    name = module_name(root) or read_text(root / "sys/class/dmi/id/product_name") or "unknown"
    return Hardware(module=name[:LONGEST], mem_mb=memory_mb(root)[1])


def software(root: Path = Path("/")) -> dict[str, str]:
    """The release of Jetson Linux; elsewhere nothing."""
    release = l4t_version(root)
    return {} if release is None else {"l4t": release[:LONGEST]}
