from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import pytest

from agent.commands import models as command

WEIGHTS = b"onnx" * 1000
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()
MANIFEST = """
name = "tiny"
aliases = ["t"]
task = "embedding"
format = "onnx"
licence = "MIT"
summary = "A [tiny] model."

[files.model]
source = "mirror:tiny.onnx"

[embedding]
dimensions = 8
max_tokens = 16
"""


class CommandLine:
    def __init__(self, state: Path, captured: pytest.CaptureFixture[str]) -> None:
        self._state = state
        self._captured = captured

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of `hotspare models <words>`."""
        parser = argparse.ArgumentParser()
        command.add_parser(parser.add_subparsers(required=True))
        arguments = parser.parse_args(["models", "--state", str(self._state), *words])
        status = arguments.run(arguments)
        output, errors = self._captured.readouterr()
        return status, output, errors


@pytest.fixture
def hotspare_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    for name in ("site", "mirror"):
        (tmp_path / name).mkdir()
    (tmp_path / "site" / "tiny.toml").write_text(MANIFEST)
    (tmp_path / "mirror" / "tiny.onnx").write_bytes(WEIGHTS)
    monkeypatch.setenv("HOTSPARE_SITE", str(tmp_path / "site"))
    monkeypatch.setenv("HOTSPARE_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("COLUMNS", "200")
    return CommandLine(tmp_path / "state", capsys)


def test_pull_show_verify_remove(hotspare_models: CommandLine, tmp_path: Path) -> None:
    blob = tmp_path / "state" / "blobs" / "sha256" / DIGEST
    assert hotspare_models("pull", "t") == (0, f"tiny model: {blob}\n", "")
    assert hotspare_models("pull", "tiny") == (0, f"tiny model: {blob} (was here)\n", "")
    status, output, _ = hotspare_models("show", "tiny")
    assert status == 0
    facts = json.loads(output)
    assert facts["files"]["model"]["path"] == str(blob)
    assert facts["files"]["model"]["recorded_sha256"] == DIGEST
    assert hotspare_models("verify")[:2] == (0, "1 files and engines read, 0 damaged\n")
    blob.chmod(0o644)
    blob.write_bytes(b"torn")
    status, output, errors = hotspare_models("verify", "tiny")
    assert status == 1 and errors.startswith(f"torn: {blob}: its content has sha256 ")
    assert hotspare_models("rm", "tiny")[:2] == (0, "tiny: 0.0 MB freed\n")
    assert not blob.exists()


def test_changed_mirror_is_refused_until_forgotten(hotspare_models: CommandLine, tmp_path: Path) -> None:
    hotspare_models("pull", "tiny")
    hotspare_models("rm", "tiny")
    (tmp_path / "mirror" / "tiny.onnx").write_bytes(b"another")
    status, _, errors = hotspare_models("pull", "tiny")
    assert status == 1
    assert errors.startswith("error: ") and "`hotspare models rm --forget NAME`" in errors and errors.count("\n") == 1
    hotspare_models("rm", "--forget", "tiny")
    assert hotspare_models("pull", "tiny")[0] == 0


def test_list(hotspare_models: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "site" / "broken.toml").write_text("name")
    hotspare_models("pull", "tiny")
    status, output, errors = hotspare_models("list")
    assert status == 0
    line = next(line for line in output.splitlines() if line.startswith("tiny "))
    assert line.split()[:5] == ["tiny", "embedding", "1/1", "0", "MIT"] and "A [tiny] model." in line
    assert "smollm2-135m-instruct" in output
    assert "broken.toml: this is not TOML" in errors


def test_a_narrow_terminal_gets_a_line_for_each_model(hotspare_models: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = hotspare_models("list")[1].splitlines()
    models = json.loads(hotspare_models("list", "--json")[1])
    assert len(lines) == len(models) + 2  # heading and sum
    assert all(len(line) <= 80 for line in lines[:-1])


def test_list_as_json(hotspare_models: CommandLine) -> None:
    facts = {entry["name"]: entry for entry in json.loads(hotspare_models("list", "--json")[1])}
    assert facts["tiny"]["aliases"] == ["t"]
    assert (facts["tiny"]["files"], facts["tiny"]["files_here"]) == (1, 0)


def test_unknown_model_is_one_line_and_nothing_is_fetched(hotspare_models: CommandLine, tmp_path: Path) -> None:
    status, output, errors = hotspare_models("pull", "tiny", "tinny")
    assert (status, output) == (1, "")
    assert errors == "error: no model is called 'tinny'; did you mean tiny?\n"
    assert not any((tmp_path / "state" / "blobs" / "sha256").iterdir())


def test_absent_file_is_one_line(hotspare_models: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "mirror" / "tiny.onnx").unlink()
    status, _, errors = hotspare_models("pull", "tiny")
    assert (status, errors) == (1, f"error: {tmp_path}/mirror/tiny.onnx does not exist\n")
