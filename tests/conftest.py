"""Fixtures that more than one folder of tests needs."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also the tests that take long and show little more")


def pytest_configure() -> None:
    # A shell starts what runs in the background with interrupts ignored, and every process that a test starts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        os.environ.setdefault("CC", str(ROOT / "tests" / "cc"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--run-slow"):
        for item in items:
            if item.get_closest_marker("slow") is not None:
                item.add_marker(pytest.mark.skip(reason="slow: make test-slow runs it"))


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
