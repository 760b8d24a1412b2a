"""The benches run and give figures; what the figures are is nobody's promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from converters.native_from_causal_model import find_compiler
from tests.conftest import ROOT
from tests.converters.tiny_gguf import Recipe, write_decoder

MANIFEST = """
name = "tiny"
task = "generation"
format = "gguf"
licence = "none"
summary = "Random weights."

[files.model]
source = "file:{path}"

[generation]
context_tokens = 128
"""


pytestmark = pytest.mark.timeout(300)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.text", *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    gguf = write_decoder(folder / "tiny.gguf", Recipe())
    (folder / "tiny.toml").write_text(MANIFEST.format(path=gguf))
    return folder


def test_help_names_what_is_measured() -> None:
    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert "--level {engine,http,both}" in done.stdout


def test_nothing_to_measure_is_refused() -> None:
    done = run("--rounds", "0")
    assert done.returncode == 2
    assert "rounds" in done.stderr


def test_a_small_run_gives_figures_of_engine_and_server(site: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.json"
    sizes = (
        "--rounds", "1", "--threads", "1", "--batch", "2", "--prompt-tokens", "16", "--decode-tokens", "8", "--long-tokens", "60"
    )  # fmt: skip
    done = run("--model", "tiny", "--store", str(tmp_path / "store"), *sizes, "--json", str(file), HOTSPARE_SITE=str(site))
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(file.read_text())
    engines = {row["way"]: row for row in figures["engine"]}
    assert "hotspare onnxruntime" in engines
    assert ("hotspare native, 8 bits" in engines) == (find_compiler() is not None)
    for row in engines.values():
        assert min(row["prefill_tokens_per_s"], row["decode_1_tokens_per_s"], row["batch_tokens_per_s"]) > 0
    assert figures["loop"]["the same tokens"] == "yes"
    ours = [row for row in figures["http"] if row["way"] == "hotspare onnxruntime"]
    kinds = ("new prompts", "repeated prompts", "new prompts beside a busy process")
    assert [(row["prompts"], row["clients"]) for row in ours] == [(kind, clients) for kind in kinds for clients in (1, 2)]
    for row in ours:
        assert _is_sane(row), row
    for name, words in figures["versions"].items():
        assert f"{name}: {words}" in done.stdout
        assert words.startswith("not installed: pip install") or "pip" not in words


def _is_sane(row: Mapping[str, Any]) -> bool:
    """An answer may end before its 8 tokens: over HTTP the model's end mark counts."""
    return bool(0 < row["ttft_p50_ms"] <= row["ttft_p95_ms"] and row["prompt_tokens"] >= 16 and 0 <= row["tokens"] <= 8)
