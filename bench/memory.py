"""Memory of a node that looks at a camera: the daemon and its vision worker, each as the kernel counts it.

    python -m bench.memory [--model NAME] [--source SOURCE] [--frames 100] [--json FILE]

With HOTSPARE_TEST_DATA (default: ../shared) a film of people through FFmpeg, looked at by DEIMv2-Femto; without, the rendered belt.
HOTSPARE_SITE and HOTSPARE_MIRROR are passed on, for other models. `resident` counts what processes share in each of them, `own` only once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from agent.demo.programs import free_port
from agent.demo.stage import to_toml
from agent.worker.sources import redacted
from bench.report import machine, report, table

START_S = 300.0
CAMERA = "door"
DATA = Path(os.environ.get("HOTSPARE_TEST_DATA", Path(__file__).parents[2] / "shared")).resolve()
FILM, WEIGHTS = DATA / "data" / "people.mp4", DATA / "models"
MODEL, SOURCE = ("deimv2-femto", f"file:{FILM}") if FILM.exists() and WEIGHTS.exists() else ("conveyor-detr", "conveyor:")


def kilobytes(process: int, field: str) -> int:
    rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", rollup, re.M)
    return int(found[1]) if found else 0


def children(process: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def name_of(process: int) -> str:
    words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    return " ".join(word.decode(errors="replace") for word in words if not word.startswith(b"/"))[:60]


def measured(node: int) -> list[dict[str, Any]]:
    return [
        {"process": "daemon" if process == node else name_of(process), **{
            name: round(kilobytes(process, field) / 1024, 1) for name, field in (("resident_mb", "Rss"), ("own_mb", "Pss"))
        }}
        for process in (node, *children(node))
    ]  # fmt: skip


def watch(port: int, node: subprocess.Popen[bytes], frames: int) -> None:
    """Wait until the camera's pictures were looked at so many times."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if node.poll() is not None:
            raise SystemExit(f"the node ended with status {node.returncode}; its log is above")
        try:
            status = httpx.get(f"http://127.0.0.1:{port}/cameras/{CAMERA}", trust_env=False, timeout=5).json()
        except (httpx.TransportError, ValueError):
            status = {}
        if (status.get("processed") or 0) >= frames:
            return
        time.sleep(0.2)
    raise SystemExit(f"the camera was not looked at {frames} times within {START_S:g} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="(default: %(default)s)")
    parser.add_argument("--source", default=SOURCE, help="as a camera has it: rtsp://…, file:/…, conveyor: (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        port, home = free_port(), Path(folder)
        settings = {
            "node": {"id": "bench-memory", "state": str(home / "state")},
            "http": {"port": port},
            "worker": {"threads": 2},
            "models": {"serve": [given.model]},
            "cameras": [{"id": CAMERA, "source": given.source, "model": given.model, "fps": 10}],
        }
        (home / "node.toml").write_text(to_toml(settings))
        command = [sys.executable, "-m", "agent.cli", "run", "--config", str(home / "node.toml")]
        with subprocess.Popen(command, env={"HOTSPARE_MIRROR": str(WEIGHTS), **os.environ}) as node:
            try:
                watch(port, node, given.frames)
                rows = measured(node.pid)
            finally:
                node.terminate()
                node.wait(30)
    whole = {"process": "all", **{key: round(sum(row[key] for row in rows), 1) for key in ("resident_mb", "own_mb")}}
    lines = [[row["process"], row["resident_mb"], row["own_mb"]] for row in [*rows, whole]]
    figures = {"bench": "memory", "model": given.model, "source": redacted(given.source), "machine": machine(), "rows": rows, "all": whole}
    report(
        [table(f"{redacted(given.source)} with {given.model}", ["process", "resident MB", "own MB"], lines)],
        [],
        json.loads(json.dumps(figures)),
        given.json,
    )


if __name__ == "__main__":
    main()
