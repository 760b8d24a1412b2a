from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from models import checksums
from models.checksums import MEMORY_NAME, damage_of, whole_engine
from models.durable import sha256_of
from models.engine_record import EngineKey
from models.store import Store, open_store

KEY = EngineKey("tiny", "m" * 64, {}, "copy/1", "onnxruntime", "1.23.0", "cpu", "float32")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "state")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read, in turn."""
    names: list[str] = []
    real = sha256_of

    def counted(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(checksums, "sha256_of", counted)
    return names


def publish(store: Store, key: EngineKey = KEY) -> Path:
    with store.temporary() as folder:
        (folder / "model.onnx").write_bytes(b"graph")
        (folder / "model.onnx.data").write_bytes(b"weights")
        return store.publish_engine(key, folder, {}, {}).folder


def damage(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def test_each_content_is_read_once(store: Store, read: list[str]) -> None:
    folder = publish(store)
    assert damage_of(folder) is None
    assert read == ["model.onnx", "model.onnx.data"]
    assert damage_of(folder) is None
    assert len(read) == 2, "a restart reads nothing again"
    os.utime(folder)
    assert damage_of(folder) is None
    assert len(read) == 2, "being used is no change"


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_whatever_was_written_to_is_read_again_and_told(store: Store, read: list[str], name: str) -> None:
    folder = publish(store)
    assert damage_of(folder) is None
    facts, whole = (folder / name).stat(), (folder / name).read_bytes()
    damage(folder / name, bytes([whole[0] ^ 1]) + whole[1:])
    os.utime(folder / name, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # as a copy with its times would look
    assert f"{name} is not the file that was published" in str(damage_of(folder))
    assert read[-1] == name
    assert damage_of(folder) is not None, "not taken for right by being asked twice"
    assert whole_engine(folder) is None
    damage(folder / name, whole)
    assert damage_of(folder) is None


def test_a_file_too_many_or_a_short_one_is_damage_too(store: Store) -> None:
    folder = publish(store)
    (folder / "extra.so").write_bytes(b"")
    assert "disagree" in str(damage_of(folder))


def test_a_build_that_is_being_looked_at_has_nothing_to_be_held_to(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    assert damage_of(tmp_path) is None


def test_what_is_remembered_is_no_more_than_what_is_there(store: Store) -> None:
    gone, kept = publish(store), publish(store, replace(KEY, model="other"))
    assert damage_of(gone) is damage_of(kept) is None
    store.discard(gone)
    again = publish(store, replace(KEY, device="gpu"))
    assert damage_of(again) is None
    memory = json.loads((store.root / MEMORY_NAME).read_text())
    assert set(memory) == {f"other/{kept.name}", f"tiny/{again.name}"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tiny": 3}'])
def test_a_damaged_memory_only_costs_time(store: Store, text: str) -> None:
    (store.root / MEMORY_NAME).write_text(text)
    assert damage_of(publish(store)) is None


def test_a_store_that_cannot_be_written_serves_all_the_same(store: Store, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checksums, "write_atomically", refuse)
    folder = publish(store)
    assert damage_of(folder) is None
    assert damage_of(folder) is None
    assert len(read) == 4
