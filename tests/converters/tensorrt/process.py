"""The converter as its parent sees it: a request on standard input, lines on standard output, an exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

MODULE = "converters.tensorrt_from_onnx"
DEADLINE_S = 90


@dataclass(frozen=True)
class Ended:
    status: int
    lines: tuple[dict[str, Any], ...]
    log: str

    @property
    def result(self) -> dict[str, Any]:
        assert self.status == 0 and "result" in self.lines[-1], f"status {self.status}: {self.lines[-1:]}\n{self.log[-2000:]}"
        return dict(self.lines[-1]["result"])

    @property
    def error(self) -> dict[str, Any]:
        assert self.status != 0 and "error" in self.lines[-1], f"status {self.status}: {self.lines[-1:]}\n{self.log[-2000:]}"
        return dict(self.lines[-1]["error"])

    @property
    def progress(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "phase" in line]


def request(onnx: Path, plan: Path, **more: Any) -> dict[str, Any]:
    return {"module": "tensorrt_rtx", "onnx": str(onnx), "plan": str(plan), **more}


def build(
    value: Mapping[str, Any] | bytes,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Ended:
    """Run the process to its end. `before` runs in the child before its program does."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    done = subprocess.run(
        [python, "-m", MODULE],
        cwd=ROOT,
        input=text,
        capture_output=True,
        timeout=DEADLINE_S,
        env={**os.environ, "PYTHONPATH": "", **(environment or {})},
        preexec_fn=before,
    )
    return Ended(done.returncode, tuple(map(json.loads, done.stdout.splitlines())), done.stderr.decode(errors="replace"))


@contextmanager
def building(value: Mapping[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in mid-build: it has told a fraction of the phase `build`."""
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(value).encode())
        process.stdin.close()
        until = time.monotonic() + DEADLINE_S
        for line in process.stdout:
            assert time.monotonic() < until, "it never came to building"
            told = json.loads(line)
            assert "phase" in told, told
            if told["phase"] == "build":
                break
        yield process
    finally:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()
