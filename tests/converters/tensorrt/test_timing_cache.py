"""The timing cache is one file for all builds of a device: two that end together both find their kernels in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from converters.tensorrt_from_onnx.timing_cache import read_content
from tests.conftest import ROOT

ROUNDS = 25
VERSION = "10.3.0"
# A builder that times one kernel in each build: its cache is a line for each.
BUILDER = """
import sys
from pathlib import Path
from converters.tensorrt_from_onnx.timing_cache import keep_timing_cache, use_timing_cache

class Cache:
    def __init__(self, content): self.kernels = set(content.split())
    def combine(self, other, ignores_mismatch): self.kernels |= other.kernels; return True
    def serialize(self): return b" ".join(sorted(self.kernels))

class Config:
    def create_timing_cache(self, content): return Cache(content)
    def set_timing_cache(self, cache, ignores_mismatch): self.cache = cache; return True
    def get_timing_cache(self): return self.cache

name, file = sys.argv[1], Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(ROUNDS):
    config = Config()
    use_timing_cache(config, file, "VERSION").kernels.add(f"{name}{number}".encode())
    keep_timing_cache(config, file, "VERSION")
"""


def test_builds_that_end_together_lose_nothing_of_each_other(tmp_path: Path) -> None:
    file = tmp_path / "timing.cache"
    program = BUILDER.replace("ROUNDS", str(ROUNDS)).replace("VERSION", VERSION)
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", program, name, str(file)],
            cwd=str(ROOT),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in ("a", "b")
    ]
    for builder in builders:
        assert builder.stdout is not None and builder.stdout.readline() == b"ready\n"
    for builder in builders:
        assert builder.stdin is not None
        builder.stdin.write(b"go\n")
        builder.stdin.flush()
    for builder in builders:
        _, log = builder.communicate(timeout=90)
        assert (builder.returncode, log) == (0, b"")
    assert set(read_content(file, VERSION).split()) == {f"{name}{number}".encode() for name in "ab" for number in range(ROUNDS)}
