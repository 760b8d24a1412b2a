from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from models.durable import StoreBusy, StoreError, sweep, write_atomically
from models.engine_record import RECORD_NAME, EngineKey
from models.store import Store, default_root, open_store

KEY = EngineKey(
    model="tiny",
    manifest="m" * 64,
    sources={"model": "a" * 64},
    converter="onnx_from_gguf/1",
    runtime="onnxruntime",
    runtime_version="1.23.0",
    device="cpu",
    precision="int4",
    options={"slots": "4"},
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "state")


def publish(store: Store, key: EngineKey = KEY, content: bytes = b"weights") -> Path:
    with store.temporary() as folder:
        (folder / "model.onnx").write_bytes(content)
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
        return store.publish_engine(key, folder, {"mean_kl": 0.001}, {"onnxruntime": "1.23.0"}).folder


def test_published_engine_is_found_with_its_record(store: Store) -> None:
    folder = publish(store)
    engine = store.find_engine(KEY)
    assert engine is not None
    assert engine.folder == folder == store.root / "engines" / "tiny" / KEY.digest()
    assert engine.record.key == KEY
    assert engine.record.verdict == {"mean_kl": 0.001}
    assert engine.path("tokenizer/tokenizer.json").read_text() == "{}"
    assert engine.size_bytes == len(b"weights") + 2
    with pytest.raises(KeyError, match=r"it has model\.onnx"):
        engine.path("absent")
    assert list((store.root / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"manifest": "n" * 64},
        {"sources": {"model": "b" * 64}},
        {"converter": "onnx_from_gguf/2"},
        {"runtime": "tensorrt"},
        {"runtime_version": "1.23.1"},
        {"device": "Orin/sm_87"},
        {"precision": "float16"},
        {"options": {"slots": "8"}},
    ],
)
def test_engine_of_another_key_is_not_found(store: Store, change: dict[str, object]) -> None:
    publish(store)
    assert store.find_engine(replace(KEY, **change)) is None  # type: ignore[arg-type]  # fields of the table above


def test_digest_of_a_key_does_not_change_between_processes() -> None:
    """The digest is a folder's name: a change of it makes every node build everything anew."""
    assert KEY.digest() == "21c5c726d27f94b3e1e3361283da542d"


def damage_record_truncated(folder: Path) -> None:
    text = (folder / RECORD_NAME).read_bytes()
    (folder / RECORD_NAME).write_bytes(text[: len(text) // 2])


def damage_record_absent(folder: Path) -> None:
    (folder / RECORD_NAME).unlink()


def damage_file_truncated(folder: Path) -> None:
    (folder / "model.onnx").chmod(0o644)
    (folder / "model.onnx").write_bytes(b"wei")


def damage_file_absent(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def damage_other_key(folder: Path) -> None:
    facts = json.loads((folder / RECORD_NAME).read_bytes())
    facts["key"]["precision"] = "float32"
    (folder / RECORD_NAME).write_text(json.dumps(facts))


def damage_path_that_leaves(folder: Path) -> None:
    facts = json.loads((folder / RECORD_NAME).read_bytes())
    facts["files"]["../../../../etc/passwd"] = facts["files"].pop("model.onnx")
    (folder / RECORD_NAME).write_text(json.dumps(facts))


def damage_other_format(folder: Path) -> None:
    facts = json.loads((folder / RECORD_NAME).read_bytes())
    facts["format"] = 2
    (folder / RECORD_NAME).write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "damage",
    [
        damage_record_truncated,
        damage_record_absent,
        damage_file_truncated,
        damage_file_absent,
        damage_other_key,
        damage_path_that_leaves,
        damage_other_format,
    ],
)
def test_torn_engine_is_absent_and_replaced_by_the_next_build(store: Store, damage: object) -> None:
    folder = publish(store)
    assert callable(damage)
    damage(folder)
    assert store.find_engine(KEY) is None
    assert store.engines() == []
    assert publish(store, content=b"built anew") == folder
    engine = store.find_engine(KEY)
    assert engine is not None and engine.path("model.onnx").read_bytes() == b"built anew"


def test_whole_engine_is_not_replaced(store: Store) -> None:
    """A worker may have it open."""
    publish(store, content=b"first")
    folder = publish(store, content=b"second")
    assert (folder / "model.onnx").read_bytes() == b"first"


def test_engine_holds_only_plain_files(store: Store) -> None:
    with store.temporary() as folder:
        (folder / "model.onnx").symlink_to("/etc/passwd")
        with pytest.raises(StoreError, match="not a plain file"):
            store.publish_engine(KEY, folder, {}, {})
    with store.temporary() as folder, pytest.raises(StoreError, match="holds no files"):
        store.publish_engine(KEY, folder, {}, {})


def test_model_name_cannot_lead_out_of_the_store(store: Store) -> None:
    with pytest.raises(StoreError, match="cannot be stored"):
        store.find_engine(replace(KEY, model="../../tmp"))


BUILDER = """
import sys
from pathlib import Path
from models.store import open_store
store = open_store(Path(sys.argv[1]))
with store.lock("build", 1.0), store.temporary() as folder:
    (folder / "half").write_bytes(b"x")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_killed_build_leaves_no_lock_and_its_folder_is_swept(store: Store) -> None:
    command = [sys.executable, "-c", BUILDER, str(store.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        folder = Path(builder.stdout.readline().strip())
        assert sweep(store.root / "temporary") == 0, "the folder of a living process stays"
        begun = time.monotonic()
        with pytest.raises(StoreBusy, match="busy with build"), store.lock("build", 0.3):
            pass
        assert 0.3 <= time.monotonic() - begun < 5.0
        builder.send_signal(signal.SIGKILL)
        builder.wait(10)
    assert folder.is_dir()
    with store.lock("build", 0.0):
        open_store(store.root)
    assert not folder.exists()


def test_atomic_write_keeps_the_old_content_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "pins"
    write_atomically(target, b"old")
    with pytest.raises(TypeError):
        write_atomically(target, None)  # type: ignore[arg-type]  # any failure in mid-write
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_damaged_record_of_sources_is_not_taken_for_an_empty_one(store: Store) -> None:
    """Else digests recorded at first use would silently be recorded anew."""
    (store.root / "sources.json").write_bytes(b'{"hf:a/b@main/x": {"sha2')
    with pytest.raises(StoreError, match=r"sources\.json is damaged"):
        store.recorded_sha256("hf:a/b@main/x")


def test_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="set HOTSPARE_STATE"):
        open_store(tmp_path / "file" / "state")


def test_the_store_is_where_the_nodes_environment_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSPARE_STATE", str(tmp_path / "state"))
    assert open_store().root == tmp_path / "state"
    monkeypatch.setenv("HOTSPARE__MODELS__STORE", str(tmp_path / "ssd"))
    assert open_store().root == tmp_path / "ssd"


def test_default_root() -> None:
    home = {"HOME": "/home/someone"}
    assert default_root(home) == Path("/home/someone/.local/share/hotspare")
    assert default_root({**home, "XDG_DATA_HOME": "/data"}) == Path("/data/hotspare")
    assert default_root({**home, "STATE_DIRECTORY": "/var/lib/hotspare:/var/lib/other"}) == Path("/var/lib/hotspare")
    assert default_root({**home, "STATE_DIRECTORY": "/var/lib/hotspare", "HOTSPARE_STATE": "/mnt/ssd"}) == Path("/mnt/ssd")


def test_every_name_in_the_store_is_readable_by_the_group(store: Store) -> None:
    """A worker may run as another user than the one that fetched."""
    folder = publish(store)
    modes = {path.relative_to(folder).as_posix(): path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}
    assert modes["."] == 0o755 and modes["model.onnx"] == 0o444 and modes[RECORD_NAME] == 0o644
