"""Rules of the repository itself: sizes of files, links, nothing generated."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LARGEST_FILE_LINES = 400
P90_LINES = 240


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


def test_files_stay_small() -> None:
    sizes = {file: len(file.read_text().splitlines()) for file in tracked("*.py") if "tests" not in file.parts}
    large = {str(file.relative_to(ROOT)): lines for file, lines in sizes.items() if lines > LARGEST_FILE_LINES}
    assert not large, f"split these, {LARGEST_FILE_LINES} lines is the limit: {large}"
    ordered = sorted(sizes.values())
    assert ordered[len(ordered) * 9 // 10] <= P90_LINES


@pytest.mark.parametrize("document", tracked("*.md"), ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"


def test_only_the_conveyor_weights_are_generated() -> None:
    large = {file.relative_to(ROOT).as_posix(): file.stat().st_size for file in tracked() if file.stat().st_size > 200_000}
    assert set(large) <= {"models/weights/conveyor_detr.onnx"}, f"weights, logs and pictures do not belong here: {large}"
    assert all(size <= 1_500_000 for size in large.values())
