"""Against a real datagram socket, as systemd's is."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from agent.sdnotify import notify, watchdog_interval_s


def test_a_message_reaches_the_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(5)
        assert notify("READY=1\nSTATUS=mode=standby", {"NOTIFY_SOCKET": path})
        assert manager.recv(1000) == b"READY=1\nSTATUS=mode=standby"


def test_without_a_manager_nothing_happens(tmp_path: Path) -> None:
    assert not notify("READY=1", {})
    assert not notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})


def test_the_watchdog_is_fed_at_half_its_time_and_only_by_its_process() -> None:
    assert watchdog_interval_s({"WATCHDOG_USEC": "30000000"}) == 15.0
    assert watchdog_interval_s({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid() + 1)}) is None
    assert watchdog_interval_s({}) is None
