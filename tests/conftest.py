"""Fixtures that more than one folder of tests needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with real models and pictures (HOTSPARE_TEST_DATA); absent: skip, but in CI an error."""
    folder = Path(os.environ.get("HOTSPARE_TEST_DATA", ROOT / ".." / "shared")).resolve()
    if not (folder / "models").is_dir():
        reason = f"test data is not at {folder}; set HOTSPARE_TEST_DATA"
        if os.environ.get("HOTSPARE_REQUIRE_TEST_DATA"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
