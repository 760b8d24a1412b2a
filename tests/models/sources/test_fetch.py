from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.durable import NoSpace, StoreBusy
from models.manifest import ModelFile
from models.sources import DigestMismatch, NotThere, SourceError, base_name, fetch
from models.sources.partial import read_partial
from models.store import Store, open_store
from tests.models.sources.file_server import FileServer, Served

BODY = np.random.default_rng(11).bytes(300_000)
DIGEST = hashlib.sha256(BODY).hexdigest()
SOURCE = "hf:acme/tiny@main/model.onnx"
PATH = "/acme/tiny/resolve/main/model.onnx"
DEADLINE_S = 30.0

CHILD = """
import sys
from pathlib import Path
from models.manifest import ModelFile
from models.sources import fetch
from models.store import open_store
print(fetch(ModelFile(sys.argv[2]), open_store(Path(sys.argv[1]))))
"""


def hub(server: FileServer) -> dict[str, str]:
    return {"HF_ENDPOINT": server.url}


def child(store: Store, source: str, server: FileServer) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_ENDPOINT": server.url}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(store.root), source], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_pinned_file_lands_under_its_digest_read_only(store: Store, server: FileServer) -> None:
    server.files[PATH] = Served(BODY)
    path = fetch(ModelFile(SOURCE, DIGEST, len(BODY)), store, environment=hub(server))
    assert path == store.root / "blobs" / "sha256" / DIGEST
    assert path.read_bytes() == BODY
    assert path.stat().st_mode & 0o777 == 0o444
    assert not any((store.root / "partial").rglob("data*"))
    assert list((store.root / "temporary").iterdir()) == []


def test_second_fetch_asks_nobody(store: Store, server: FileServer) -> None:
    server.files[PATH] = Served(BODY)
    file = ModelFile(SOURCE)
    first = fetch(file, store, environment=hub(server))
    assert fetch(file, store, environment={"HF_ENDPOINT": "http://localhost:1"}) == first
    assert len(server.requests) == 1


def test_wrong_digest_is_deleted_and_both_are_named(store: Store, server: FileServer) -> None:
    server.files[PATH] = Served(BODY)
    wanted = "0" * 64
    with pytest.raises(DigestMismatch) as caught:
        fetch(ModelFile(SOURCE, wanted), store, environment=hub(server))
    assert wanted in str(caught.value) and DIGEST in str(caught.value)
    assert not any((store.root / "blobs").rglob("?" * 64))
    assert not any((store.root / "partial").rglob("data*"))


def test_digest_of_the_first_use_is_held_to(store: Store, server: FileServer) -> None:
    server.files[PATH] = Served(BODY)
    file = ModelFile(SOURCE)
    fetch(file, store, environment=hub(server)).unlink()
    server.files[PATH] = Served(BODY + b"!", etag='"two"')
    with pytest.raises(DigestMismatch, match=rf"{DIGEST} was recorded at its first use.*rm --forget"):
        fetch(file, store, environment=hub(server))
    store.forget_sources([SOURCE])
    assert fetch(file, store, environment=hub(server)).read_bytes() == BODY + b"!"


def test_killed_download_is_resumed_by_the_next_process(store: Store, server: FileServer) -> None:
    body = np.random.default_rng(3).bytes(20 << 20)
    served = server.files[PATH] = Served(body, stall_after=17 << 20)
    partial = store.partial_folder(SOURCE) / "data"
    url = server.url + PATH
    with child(store, SOURCE, server) as process:
        wait_until(lambda: read_partial(partial, url).durable_bytes >= 16 << 20)
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE_S)
    served.go_on.set()
    kept_bytes = read_partial(partial, url).durable_bytes
    assert any((store.root / "temporary").iterdir())
    path = fetch(ModelFile(SOURCE), open_store(store.root), environment=hub(server))
    assert server.requests[-1][1]["range"] == f"bytes={kept_bytes}-"
    assert path.read_bytes() == body
    assert list((store.root / "temporary").iterdir()) == []


def test_two_processes_fetch_once(store: Store, server: FileServer) -> None:
    served = server.files[PATH] = Served(BODY, stall_after=1000)
    with child(store, SOURCE, server) as one, child(store, SOURCE, server) as two:
        wait_until(lambda: len(server.requests) == 1)
        served.go_on.set()
        outputs = [process.communicate(timeout=DEADLINE_S) for process in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] == f"{store.blob_path(DIGEST)}\n"
    assert len(server.requests) == 1


def test_waiting_for_another_process_has_a_deadline(store: Store, server: FileServer) -> None:
    served = server.files[PATH] = Served(BODY, stall_after=1000)
    with child(store, SOURCE, server) as process:
        wait_until(lambda: len(server.requests) == 1)
        with pytest.raises(StoreBusy, match="another process"):
            fetch(ModelFile(SOURCE), store, environment=hub(server), wait_s=0.2)
        served.go_on.set()
        assert process.wait(DEADLINE_S) == 0


def test_full_disk_is_told_with_sizes_and_remedy(store: Store, server: FileServer) -> None:
    server.files[PATH] = Served(BODY)
    full = Store(store.root, free_bytes=lambda path: 50_000_000)
    with pytest.raises(NoSpace, match=r"model.onnx needs 0.3 MB and a reserve of 67.1 MB, but .* has 50.0 MB free; make room"):
        fetch(ModelFile(SOURCE), full, environment=hub(server))


@pytest.mark.parametrize("name", [DIGEST, "hf/acme/tiny@main/model.onnx", "model.onnx"])
def test_mirror_folder_comes_first(store: Store, server: FileServer, tmp_path: Path, name: str) -> None:
    mirrored = tmp_path / "mirror" / name
    mirrored.parent.mkdir(parents=True)
    mirrored.write_bytes(BODY)
    environment = {**hub(server), "HOTSPARE_MIRROR": str(tmp_path / "mirror")}
    assert fetch(ModelFile(SOURCE, DIGEST), store, environment=environment).read_bytes() == BODY
    assert server.requests == []


@pytest.mark.parametrize("name", [DIGEST, "hf/acme/tiny%40main/model.onnx", "model.onnx"])
def test_mirror_url_comes_first(store: Store, server: FileServer, name: str) -> None:
    server.files[f"/mirror/{name}"] = Served(BODY)
    environment = {"HF_ENDPOINT": "http://localhost:1", "HOTSPARE_MIRROR": f"{server.url}/mirror/"}
    assert fetch(ModelFile(SOURCE, DIGEST), store, environment=environment).read_bytes() == BODY


def test_base_name_alone_never_stands_for_a_file_of_unknown_digest(store: Store, server: FileServer, tmp_path: Path) -> None:
    """Many models have a `config.json`."""
    (tmp_path / "model.onnx").write_bytes(b"of another model")
    server.files[PATH] = Served(BODY)
    environment = {**hub(server), "HOTSPARE_MIRROR": str(tmp_path)}
    assert fetch(ModelFile(SOURCE), store, environment=environment).read_bytes() == BODY


def test_wrong_file_in_the_mirror_is_passed_over(
    store: Store, server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"of another model")
    server.files[PATH] = Served(BODY)
    environment = {**hub(server), "HOTSPARE_MIRROR": str(tmp_path)}
    assert fetch(ModelFile(SOURCE, DIGEST), store, environment=environment).read_bytes() == BODY
    assert "was of no use" in caplog.text


def test_failure_names_every_place_that_was_asked(store: Store, server: FileServer, tmp_path: Path) -> None:
    environment = {**hub(server), "HOTSPARE_MIRROR": str(tmp_path)}
    with pytest.raises(NotThere, match=rf"answered 404 .*also asked: {tmp_path}/hf/acme"):
        fetch(ModelFile(SOURCE), store, environment=environment)


def test_wrong_file_outweighs_absent_ones(store: Store, tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "model.onnx").write_bytes(b"another")
    with pytest.raises(DigestMismatch, match=rf"pins {DIGEST}.*also asked: {tmp_path}/{DIGEST}, {tmp_path}/model.onnx"):
        fetch(ModelFile("mirror:part/model.onnx", DIGEST), store, environment={"HOTSPARE_MIRROR": str(tmp_path)})


def test_mirror_source(store: Store, tmp_path: Path) -> None:
    file = ModelFile("mirror:part/model.onnx")
    with pytest.raises(SourceError, match=r"set HOTSPARE_MIRROR to a folder or URL that holds model\.onnx"):
        fetch(file, store, environment={})
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "model.onnx").write_bytes(BODY)
    assert fetch(file, store, environment={"HOTSPARE_MIRROR": str(tmp_path)}).name == DIGEST


def test_file_source_is_copied(store: Store, tmp_path: Path) -> None:
    original = tmp_path / "model.onnx"
    original.write_bytes(BODY)
    path = fetch(ModelFile(f"file:{original}"), store)
    original.write_bytes(b"changed later")
    assert path.read_bytes() == BODY
    with pytest.raises(SourceError, match="not a regular file"):
        fetch(ModelFile(f"file:{tmp_path}"), store)
    with pytest.raises(SourceError, match="not absolute"):
        fetch(ModelFile("file:model.onnx"), store)


def test_shipped_source_stays_in_the_package(store: Store) -> None:
    path = fetch(ModelFile("shipped:manifests/smollm2-135m-instruct.toml"), store)
    assert b"smollm2" in path.read_bytes()
    for location in ("../pyproject.toml", "/etc/passwd"):
        with pytest.raises(SourceError, match="leaves the package"):
            fetch(ModelFile(f"shipped:{location}"), store)


@pytest.mark.parametrize("source", ["mirror:../secret", "hf:a/b@main/../../x", "pypi:a==1/../x"])
def test_no_source_leaves_the_mirror(store: Store, tmp_path: Path, source: str) -> None:
    (tmp_path / "secret").write_bytes(BODY)
    (tmp_path / "mirror").mkdir()
    with pytest.raises(SourceError, match="leaves its folder"):
        fetch(ModelFile(source), store, environment={"HOTSPARE_MIRROR": str(tmp_path / "mirror")})


def test_hub_token_goes_to_the_hub(store: Store, server: FileServer, tmp_path: Path) -> None:
    server.files[PATH] = Served(BODY)
    (tmp_path / "token").write_text("hf_secret\n")
    fetch(ModelFile(SOURCE), store, environment={**hub(server), "HF_TOKEN_PATH": str(tmp_path / "token")})
    assert server.requests[0][1]["authorization"] == "Bearer hf_secret"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf:o/r@main/sub/config.json", "config.json"),
        ("pypi:d==1.0/pkg/model.onnx", "model.onnx"),
        ("mirror:model.onnx", "model.onnx"),
        ("https://host/a/model.onnx?download=true", "model.onnx"),
    ],
)
def test_base_name(source: str, name: str) -> None:
    assert base_name(ModelFile(source)) == name
