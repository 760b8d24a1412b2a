"""Lines of the log: one JSON object each, with the priority that journald reads and a time for those who read a file."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from datetime import datetime

from agent.log import JournalFormatter


def test_a_line_has_priority_time_and_everything_on_one_line() -> None:
    record = logging.LogRecord("agent.standby", logging.WARNING, "standby.py", 1, "mode %s\nafter %s", ("active", "standby"), None)
    line = JournalFormatter().format(record)
    assert "\n" not in line and line.startswith("<4>{")
    values = json.loads(line[3:])
    assert (values["level"], values["logger"], values["message"]) == ("warning", "agent.standby", "mode active\nafter standby")
    assert abs(datetime.fromisoformat(values["time"]).timestamp() - record.created) < 0.001


def test_bad_requests_leave_no_lines() -> None:
    script = """
import logging
from agent.log import configure
configure()
logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
logging.getLogger("python_multipart.multipart").warning("Expected boundary character 45")
logging.getLogger("agent").info("a transition")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30)
    assert [json.loads(line[3:])["message"] for line in done.stderr.splitlines()] == ["a transition"]
