from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from models.durable import StoreBusy
from models.engine_record import RECORD_NAME, EngineKey, content_digest, read_engine
from models.manifest import Embedding, EmbeddingManifest, ModelFile
from models.store import SPACE_RESERVE_BYTES, Store, open_store
from models.upkeep import discard_torn_engines, discard_torn_files, evict, make_room, remove, repair, repair_engine, usage, verify

KEY = EngineKey("tiny", "m" * 64, {}, "copy/1", "onnxruntime", "1.23.0", "cpu", "float32")


def manifest(name: str, *sources: str) -> EmbeddingManifest:
    files = {f"part{index}": ModelFile(source) for index, source in enumerate(sources)}
    return EmbeddingManifest(name, "Apache-2.0", "", "onnx", files, embedding=Embedding(8, 8))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "state")


def add_blob(store: Store, source: str, content: bytes, used_at: float = 1000.0) -> Path:
    with store.temporary() as folder:
        (folder / "blob").write_bytes(content)
        path = store.adopt(folder / "blob", source, hashlib.sha256(content).hexdigest())
    os.utime(path, (used_at, used_at))
    return path


def add_engine(store: Store, model: str = "tiny", content: bytes = b"engine", used_at: float = 1000.0) -> Path:
    with store.temporary() as folder:
        (folder / "model.onnx").write_bytes(content)
        path = store.publish_engine(replace(KEY, model=model), folder, {}, {}).folder
    os.utime(path, (used_at, used_at))
    return path


def test_whole_store_is_whole(store: Store) -> None:
    add_blob(store, "mirror:a", b"aaa")
    add_engine(store)
    seen: list[Path] = []
    assert verify(store, progress=seen.append) == []
    assert len(seen) == 2


def test_verify_names_what_is_torn_and_what_is_foreign(store: Store) -> None:
    blob, engine = add_blob(store, "mirror:a", b"aaa"), add_engine(store)
    torn_engine = add_engine(store, "other")
    blob.chmod(0o644)
    blob.write_bytes(b"aab")
    (blob.parent / "readme.txt").write_text("not ours")
    (engine / "model.onnx").chmod(0o644)
    (engine / "model.onnx").write_bytes(b"ENGINE")  # of the same length: only its digest tells
    (engine / "extra.bin").write_bytes(b"")
    (torn_engine / RECORD_NAME).write_bytes(b"{")
    found = {(damage.kind, damage.path) for damage in verify(store)}
    assert read_engine(engine) is None, "what lies beside an engine could be loaded with it"
    assert found == {
        ("torn", blob),
        ("foreign", blob.parent / "readme.txt"),
        ("torn", engine / "model.onnx"),
        ("foreign", engine / "extra.bin"),
        ("torn", torn_engine),
    }
    assert {damage.path for damage in verify(store, manifest("tiny", "mirror:a"))} == {blob, engine / "model.onnx", engine / "extra.bin"}


def test_remove_keeps_what_other_models_need(store: Store) -> None:
    own, common = add_blob(store, "mirror:own", b"x" * 1000), add_blob(store, "mirror:common", b"y" * 500)
    engine, other_engine = add_engine(store), add_engine(store, "other")
    freed = remove(store, manifest("tiny", "mirror:own", "mirror:common"), [manifest("other", "mirror:common")])
    assert 1000 + len(b"engine") < freed < 2500
    assert not own.exists() and not engine.exists()
    assert common.exists() and other_engine.exists()
    assert store.recorded_sha256("mirror:own"), "the digest of the first use outlives the file"
    assert list((store.root / "temporary").iterdir()) == []


def test_remove_takes_unfinished_downloads_and_forgets_when_told(store: Store) -> None:
    partial = store.partial_folder("mirror:own")
    partial.mkdir()
    (partial / "data").write_bytes(b"half")
    add_blob(store, "mirror:own", b"x")
    remove(store, manifest("tiny", "mirror:own"), forget=True)
    assert not partial.exists()
    assert store.sources() == {}


def test_model_in_use_is_not_removed(store: Store) -> None:
    blob, engine = add_blob(store, "mirror:own", b"x"), add_engine(store)
    with store.using(KEY), pytest.raises(StoreBusy):
        remove(store, manifest("tiny", "mirror:own"))
    assert blob.exists() and engine.exists()


def test_eviction_takes_what_was_not_used_for_longest(store: Store) -> None:
    old, middle, new = (add_blob(store, f"mirror:{age}", bytes([age]) * 1000, used_at=age) for age in (1, 2, 3))
    assert usage(store).total_bytes == 3000
    assert evict(store, budget_bytes=3000) == []
    assert evict(store, budget_bytes=3000, needed_bytes=1500) == [old, middle]
    assert new.exists()


def test_eviction_spares_what_is_kept_or_open(store: Store) -> None:
    kept_engine, open_engine = add_engine(store, "kept", used_at=1), add_engine(store, "tiny", used_at=2)
    blob, kept_blob = add_blob(store, "mirror:a", b"a", used_at=3), add_blob(store, "mirror:b", b"b", used_at=4)
    with store.using(KEY):
        assert evict(store, budget_bytes=0, keep={"kept", kept_blob.name}) == [blob]
    assert kept_engine.exists() and open_engine.exists() and kept_blob.exists()
    assert evict(store, budget_bytes=0, keep={"kept", kept_blob.name}) == [open_engine]


def test_use_of_an_engine_counts(store: Store) -> None:
    older, newer = add_engine(store, "tiny", used_at=1), add_engine(store, "other", used_at=2)
    assert store.find_engine(KEY) is not None
    assert evict(store, usage(store).total_bytes - 1) == [newer]
    assert older.exists()


def tear(folder: Path) -> None:
    path = folder / "model.onnx"
    path.chmod(0o644)
    path.write_bytes(b"half")


def swap(folder: Path) -> None:
    path = folder / "model.onnx"
    path.chmod(0o644)
    path.write_bytes(b"ENGINE")


def link(folder: Path) -> None:
    (folder / "model.onnx").rename(folder.parent.parent / "elsewhere")
    (folder / "model.onnx").symlink_to(folder.parent.parent / "elsewhere")


def cut_record(folder: Path) -> None:
    record = folder / RECORD_NAME
    record.write_bytes(record.read_bytes()[:-20])


def link_record(folder: Path) -> None:
    (folder / RECORD_NAME).rename(folder.parent.parent / "record")
    (folder / RECORD_NAME).symlink_to(folder.parent.parent / "record")


def move_away(folder: Path) -> None:
    folder.rename(folder.parent.parent / "folder")
    folder.symlink_to(folder.parent.parent / "folder")


def add_foreign(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(b"weights of another")


SEEN_AT_ONCE = [tear, link, cut_record, link_record, move_away, add_foreign]


@pytest.mark.parametrize("damage", SEEN_AT_ONCE, ids=lambda damage: damage.__name__)
def test_a_damaged_engine_is_none_and_goes(store: Store, damage: Callable[[Path], None]) -> None:
    engine = add_engine(store)
    damage(engine)
    assert store.find_engine(KEY) is None
    assert store.engines() == []
    assert verify(store) != []
    assert discard_torn_engines(store, "tiny") == [engine]
    assert not engine.exists() and not engine.is_symlink()
    assert add_engine(store) == engine and store.find_engine(KEY) is not None


@pytest.mark.parametrize("damage", [*SEEN_AT_ONCE, swap], ids=lambda damage: damage.__name__)
def test_repair_removes_what_is_damaged_and_nothing_else(store: Store, damage: Callable[[Path], None]) -> None:
    engine, other = add_engine(store), add_engine(store, "other")
    blob, whole_blob = add_blob(store, "mirror:a", b"aaa"), add_blob(store, "mirror:b", b"bbb")
    damage(engine)
    blob.chmod(0o644)
    blob.write_bytes(b"aab")
    (blob.parent / "readme.txt").write_text("not ours")
    assert repair(store, verify(store)) == []
    assert verify(store) == []
    assert not engine.exists() and other.exists()
    assert list(blob.parent.iterdir()) == [whole_blob]


def test_what_is_in_use_is_not_repaired_away(store: Store) -> None:
    engine = add_engine(store)
    swap(engine)
    with store.using(KEY):
        assert repair(store, verify(store)) == [engine]
        assert not repair_engine(store, engine)
    assert repair_engine(store, engine)
    assert not engine.exists()


def test_a_whole_engine_is_not_repaired(store: Store) -> None:
    engine = add_engine(store)
    assert not repair_engine(store, engine)
    assert engine.exists()


def test_damaged_artefacts_of_a_model_go_so_that_they_are_fetched_again(store: Store) -> None:
    blob, whole = add_blob(store, "mirror:a", b"aaa"), add_blob(store, "mirror:b", b"bbb")
    blob.chmod(0o644)
    blob.write_bytes(b"aab")
    assert discard_torn_files(store, manifest("tiny", "mirror:a", "mirror:b")) == [blob]
    assert whole.exists()


def test_of_a_wanted_model_the_last_used_engine_of_each_runtime_stays(store: Store) -> None:
    def engine_of(runtime: str, version: str, used_at: float) -> Path:
        with store.temporary() as folder:
            (folder / "model").write_bytes(version.encode())
            path = store.publish_engine(replace(KEY, runtime=runtime, runtime_version=version), folder, {}, {}).folder
        os.utime(path, (used_at, used_at))
        return path

    old, graph = engine_of("onnxruntime", "1.19", 1.0), engine_of("onnxruntime", "1.23", 2.0)
    superseded, plan = engine_of("tensorrt", "10.3", 3.0), engine_of("tensorrt", "10.7", 4.0)
    assert evict(store, 0, keep={"tiny"}) == [old, superseded]
    assert graph.exists() and plan.exists(), "the graph serves when the next upgrade makes the plan useless"


def test_room_is_made_by_the_budget_and_by_the_disk(store: Store) -> None:
    old, new = (add_blob(store, f"mirror:{age}", bytes([age]) * 1000, used_at=age) for age in (1, 2))
    assert make_room(store, 0, None, ()) == [], "without a budget the disk is the limit"
    assert make_room(store, 1000, 3000, ()) == []
    assert make_room(store, 1001, 3000, ()) == [old]
    short = Store(store.root, free_bytes=lambda path: SPACE_RESERVE_BYTES)
    assert make_room(short, 0, 1 << 40, ()) == []
    assert make_room(short, 1, None, ()) == [new]


def test_room_that_cannot_be_made_is_no_fault(store: Store) -> None:
    add_engine(store, "kept")
    assert make_room(store, 1 << 50, 10, {"kept"}) == []


def provider_engine(store: Store, engine: Path, used_at: float, size: int = 1000) -> Path:
    """What ONNX Runtime's TensorRT provider leaves behind: an engine in a folder named by what it was made of, timings beside."""
    files = {name: file.sha256 for name, file in read_engine(engine).record.files.items()}  # type: ignore[union-attr]  # it is whole
    folder = store.root / "provider" / "Orin-sm_87-tensorrt_10.3.0-fp16" / content_digest(files, {})
    folder.mkdir(parents=True)
    (folder / "TensorrtExecutionProvider_1.engine").write_bytes(bytes(size))
    os.utime(folder, (used_at, used_at))
    return folder


def test_what_was_measured_counts_and_goes_when_it_was_not_used_for_longest(store: Store) -> None:
    engine = add_engine(store, content=b"x" * 100, used_at=9)
    cache = provider_engine(store, engine, used_at=2)
    timing, ranges = store.root / "timing" / "tensorrt.cache", store.root / "calibration" / "abc.json"
    timings = cache.parent / "TensorrtExecutionProvider_cache_sm87.timing"
    for path, used_at in ((ranges, 1), (timings, 3), (timing, 4)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(1000))
        os.utime(path, (used_at, used_at))
    assert usage(store).measured_bytes == 4000
    total = usage(store).total_bytes
    assert evict(store, total - 2001) == [ranges, cache, timings]
    assert usage(store).measured_bytes == 1000
    assert timing.exists() and engine.exists()


def test_what_a_provider_made_of_an_engine_stays_and_goes_with_it(store: Store) -> None:
    kept, other = (add_engine(store, name, content=name.encode() * 9) for name in ("kept", "other"))
    of_kept, of_other = (provider_engine(store, engine, used_at=1) for engine in (kept, other))
    assert of_other in evict(store, 0, keep={"kept"})
    assert of_kept.exists() and not of_other.exists()
    remove(store, manifest("kept"))
    assert not of_kept.exists()
