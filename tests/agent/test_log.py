"""Lines of the log: one JSON object each, with the priority that journald reads and a time for those who read a file."""

from __future__ import annotations

import json
import logging
from datetime import datetime

from agent.log import JournalFormatter


def test_a_line_has_priority_time_and_everything_on_one_line() -> None:
    record = logging.LogRecord("agent.standby", logging.WARNING, "standby.py", 1, "mode %s\nafter %s", ("active", "standby"), None)
    line = JournalFormatter().format(record)
    assert "\n" not in line and line.startswith("<4>{")
    values = json.loads(line[3:])
    assert (values["level"], values["logger"], values["message"]) == ("warning", "agent.standby", "mode active\nafter standby")
    assert abs(datetime.fromisoformat(values["time"]).timestamp() - record.created) < 0.001
