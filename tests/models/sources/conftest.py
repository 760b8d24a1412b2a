from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from models.store import Store, open_store
from tests.models.sources.file_server import FileServer, file_server


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "state")
