from __future__ import annotations

import signal

import pytest

from agent.supervision.exit_cause import EndedFor, Kind, exit_cause

IMPORT = ("Traceback (most recent call last):", "ModuleNotFoundError: No module named 'onnxruntime'")


@pytest.mark.parametrize(
    ("status", "lines", "ended_for", "oom_kills", "kind"),
    [
        (-signal.SIGSEGV, (), None, 0, "segfault"),
        (-signal.SIGBUS, (), None, 0, "segfault"),
        (-signal.SIGABRT, ("terminate called",), None, 0, "aborted"),
        (-signal.SIGABRT, (), "hang", 0, "hang"),
        (-signal.SIGKILL, (), "hang", 1, "hang"),
        (-signal.SIGKILL, (), None, 0, "killed"),
        (-signal.SIGKILL, (), None, 2, "out_of_memory"),
        (-signal.SIGTERM, (), None, 1, "killed"),
        (1, IMPORT, None, 0, "import"),
        (1, ("ValueError: no",), None, 0, "exit"),
        (0, (), "stopped", 0, "stopped"),
    ],
)
def test_kinds(status: int, lines: tuple[str, ...], ended_for: EndedFor | None, oom_kills: int, kind: Kind) -> None:
    assert exit_cause(status, lines, ended_for, oom_kills).kind == kind


def test_the_text_says_what_is_missing_where() -> None:
    cause = exit_cause(1, IMPORT, python="/usr/bin/python3")
    assert "No module named 'onnxruntime'" in cause.text
    assert "/usr/bin/python3" in cause.text


def test_an_unknown_signal_has_a_number() -> None:
    assert "signal 200" in exit_cause(-200, ()).text


def test_evidence_is_the_end_of_what_was_written() -> None:
    assert exit_cause(1, [str(number) for number in range(80)]).evidence == tuple(str(number) for number in range(30, 80))
