"""What a builder says on its way, to whoever listens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from agent import build_process
from agent.build_process import MESSAGE_CHARACTERS, run_build
from agent.model_view import build_view
from agent.preparation import PreparationFailed
from agent.state import Absent, Preparing, Renewing

pytestmark = pytest.mark.anyio

SAID = "fp16: build: Timing 3 of 9, 61 s; 12 of 40 layers can run on DLA core 0"


def a_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *lines: object) -> None:
    script = tmp_path / "builder.py"
    script.write_text("import sys\nsys.stdin.read()\n" + "".join(f"print({json.dumps(line)!r}, flush=True)\n" for line in lines))
    monkeypatch.setattr(build_process, "COMMAND", (sys.executable, str(script)))


async def test_words_come_along_with_phase_and_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_builder(
        tmp_path,
        monkeypatch,
        {"phase": "read", "fraction": 0.0},
        {"phase": "convert", "fraction": 0.4, "message": SAID},
        {"phase": "convert", "fraction": 0.5, "message": "x" * 5000},
        {"result": {"folder": "/engine"}},
    )
    told: list[tuple[str, float, str]] = []

    def hear(phase: str, fraction: float, message: str = "") -> None:
        told.append((phase, fraction, message))

    assert (await run_build({"manifest": {"name": "eyes"}}, hear, 60.0))["folder"] == "/engine"
    assert told == [("read", 0.0, ""), ("convert", 0.4, SAID), ("convert", 0.5, "x" * MESSAGE_CHARACTERS)]


async def test_a_line_that_is_none_ends_the_build_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_builder(tmp_path, monkeypatch, {"phase": "read"})
    with pytest.raises(PreparationFailed, match="no result"):
        await run_build({"manifest": {"name": "eyes"}}, lambda phase, fraction, message="": None, 60.0)


def test_the_page_and_http_have_them() -> None:
    for state, renewal in ((Preparing("convert", 0.4, SAID), None), (Absent(), Renewing("convert", 0.4, SAID))):
        view = build_view(state, renewal)
        assert view is not None
        assert (view.status, view.phase, view.progress, view.message) == ("building", "convert", 0.4, SAID)
