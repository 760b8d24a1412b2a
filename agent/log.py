"""Logging, set up once by the command line: readable lines on a terminal, JSON lines with a syslog priority for journald."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone

# sd-daemon(3): a line that begins with <N> carries its priority.
PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")  # journald has its own, a file none
        values = {"time": at, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return f"<{PRIORITY.get(record.levelno, 6)}>{json.dumps(values, ensure_ascii=False)}"


def configure(verbose: bool = False) -> None:
    """Send every logger to stderr. Third parties are held to warnings: their debug output carries payloads."""
    handler = logging.StreamHandler(sys.stderr)
    terminal = sys.stderr.isatty()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S") if terminal else JournalFormatter()
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    for name in ("paho", "uvicorn", "uvicorn.access", "httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("uvicorn.error", "python_multipart"):  # their warnings are a line for each bad request: a client could fill the disk
        logging.getLogger(name).setLevel(logging.ERROR)
