"""The bench of pictures runs with what is here, and says what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.timeout(300)
def test_a_small_run_gives_accuracy_and_parts_and_names_what_is_missing(test_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "vision.json"
    sizes = ("--models", "d-fine-n", "deimv2-femto", "--rounds", "1", "--cache", str(tmp_path / "cache"), "--json", str(file))
    done = subprocess.run(
        [sys.executable, "-m", "bench.vision", *sizes, "--peer-python", "/bin/false"], cwd=ROOT, capture_output=True, text=True,
        timeout=280, env={**os.environ, "HOTSPARE_TEST_DATA": str(test_data)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "/bin/false has no torch" in done.stdout
    figures = json.loads(file.read_text())
    rows = {row["way"]: row for row in figures["rows"]}
    assert abs(rows["hotspare"]["map"] - rows["ONNX Runtime, plain"]["map"]) < 0.003
    for row in rows.values():
        assert abs(row["ms"] - row["pre_ms"] - row["run_ms"] - row["post_ms"]) < row["ms"] / 2
    assert figures["work"]["→ float planes 800x1066"] > 0
