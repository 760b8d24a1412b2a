"""A real mosquitto on an ephemeral loopback port, for every test that needs a broker."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BINARY = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin")
CONFIGURATION = """
user root
listener {port} 127.0.0.1
allow_anonymous true
set_tcp_nodelay {nodelay}
max_packet_size 131072
persistence {persistence}
persistence_location {folder}/
autosave_interval 1
log_dest stderr
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Mosquitto:
    """One broker process that can be stopped and started again on the same port, with or without its memory."""

    def __init__(self, folder: Path, extra: str = "", keeps_state: bool = False, is_stock: bool = False) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._file = folder / "mosquitto.conf"
        values = {"port": self.port, "folder": folder, "persistence": str(keeps_state).lower(), "nodelay": str(not is_stock).lower()}
        self._file.write_text(CONFIGURATION.format(**values) + extra)

    def start(self, deadline_s: float = 10.0) -> None:
        if BINARY is None:
            pytest.skip("mosquitto is not installed; apt-get install mosquitto")
        with (self.folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen([BINARY, "-c", str(self._file)], stdout=log, stderr=log)
        end_s = time.monotonic() + deadline_s
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError(f"mosquitto did not start: {(self.folder / 'mosquitto.log').read_text()[-2000:]}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            socket.create_connection((self.host, self.port), timeout=0.2).close()
        except OSError:
            return False
        return True

    def stop(self, kill: bool = False) -> None:
        if self._process is None:
            return
        if kill:
            self._process.kill()
        else:
            self._process.terminate()
        self._process.wait(10)
        self._process = None


@contextmanager
def running_mosquitto(folder: Path, extra: str = "", keeps_state: bool = False, is_stock: bool = False) -> Iterator[Mosquitto]:
    """`extra` goes to the end of the configuration file: an ACL, TLS, limits. `is_stock` leaves Nagle's algorithm on."""
    folder.mkdir(parents=True, exist_ok=True)
    broker = Mosquitto(folder, extra, keeps_state, is_stock)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()
