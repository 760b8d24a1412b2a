"""The node's memory with a camera of a real RTSP server, FFmpeg and a nano detector: no more than is promised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.agent.worker.test_rtsp import serving
from tests.conftest import ROOT

MOST_MB = 300


@pytest.mark.slow
def test_daemon_and_vision_worker_take_no_more_than_300_mb_with_an_rtsp_camera(test_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    with serving(10) as server:
        command = [sys.executable, "-m", "bench.memory", "--model", "deimv2-femto", "--source", server.url, "--json", str(file)]
        environment = {**os.environ, "HOTSPARE_MIRROR": str(test_data / "models")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    resident_mb = {row["process"]: row["resident_mb"] for row in json.loads(file.read_text())["rows"]}
    (vision_mb,) = [size for name, size in resident_mb.items() if name.strip().endswith("vision")]
    assert vision_mb > 100, "this is no worker that looks"
    assert resident_mb["daemon"] + vision_mb <= MOST_MB, resident_mb
