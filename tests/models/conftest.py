"""Small decoders that more than one folder of tests opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.engines.tiny_native import why_not, write_tiny_native


@pytest.fixture(scope="session")
def tiny_native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if why_not():
        pytest.skip(why_not())
    return write_tiny_native(tmp_path_factory.mktemp("native") / "tiny")
