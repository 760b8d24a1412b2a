"""Engines for a node, really built by the converter: at hand, renewed, upgraded, damaged, evicted."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from agent.build_choice import BuildChoice, Machine
from agent.config import ConvertSettings
from agent.preparation import Built, PreparationFailed, Wish
from agent.prepare import BuildSettings, Preparer, first_built
from models.device import Device
from models.durable import StoreBusy, sha256_of
from models.engine_record import EngineKey
from models.engines import EngineError, open_engine, open_generation_engine
from models.manifest import Manifest, ModelFile, manifest_from_mapping
from models.record import from_mapping
from models.runtimes import Runtimes, TensorRT
from models.store import Store, open_store
from models.upkeep import remove
from tests.converters.manifests import detection, generation
from tests.converters.tiny_gguf import Recipe, write_decoder
from tests.converters.tiny_onnx import detector, save

pytestmark = pytest.mark.anyio

NO_TENSORRT_HERE = Machine(Runtimes("3.10", Device("cuda", "Orin", "87"), tensorrt=TensorRT("10.3.0")))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def eyes(tmp_path: Path, name: str = "eyes", **facts: Any) -> Manifest:
    path = save(tmp_path / f"{name}.onnx", detector())
    manifest = manifest_from_mapping({**detection(**facts), "name": name})
    file = ModelFile(f"file:{path}", sha256_of(path), path.stat().st_size)
    return replace(manifest, files={"model": file})


def preparer(
    store: Store,
    convert: ConvertSettings | None = None,
    machine: Machine | None = None,
    budget_bytes: int | None = None,
    pinned: Callable[[], frozenset[str]] = frozenset,
) -> Preparer:
    async def look_around() -> Machine:
        return machine or Machine()

    return Preparer(store, convert or ConvertSettings(nice=0), BuildSettings(threads=1, nice=0), look_around, budget_bytes, pinned)


def silent(phase: str, fraction: float, message: str = "") -> None:
    """Nobody listens."""


async def test_what_was_built_serves_at_once_and_is_found_to_be_current(store: Store, tmp_path: Path) -> None:
    wish = Wish(eyes(tmp_path))
    told: list[tuple[str, float, str]] = []
    first = await preparer(store).prepare(wish, lambda phase, fraction, message="": told.append((phase, fraction, message)))
    assert first.is_current
    assert [fraction for _, fraction, _ in told] == sorted(fraction for _, fraction, _ in told)
    assert told[-1][:2] == ("done", 1.0)
    assert ("verify", "fp32: the same inputs through source and engine") in [(phase, message) for phase, _, message in told]
    later = preparer(store)
    at_hand = await later.prepare(wish, silent)
    assert (at_hand.folder, at_hand.is_current) == (first.folder, False)
    renewed = await later.renew(replace(wish, serving=at_hand.folder), silent)
    assert (renewed.folder, renewed.is_current) == (first.folder, True)


def of_an_earlier_runtime(store: Store, built: Built) -> Path:
    """The same engine as a runtime of before the upgrade would have left it."""
    key = replace(from_mapping(EngineKey, built.record["key"]), runtime_version="1.0.0")
    with store.temporary() as folder:
        (folder / "model.onnx").write_bytes((built.folder / "model.onnx").read_bytes())
        return store.publish_engine(key, folder, built.record["verdict"], {}).folder


async def test_after_an_upgrade_the_engine_before_serves_and_a_new_one_is_built(store: Store, tmp_path: Path) -> None:
    wish = Wish(eyes(tmp_path))
    current = await preparer(store).prepare(wish, silent)
    before = of_an_earlier_runtime(store, current)
    store.discard(current.folder)
    upgraded = preparer(store)
    at_hand = await upgraded.prepare(wish, silent)
    assert (at_hand.folder, at_hand.is_current) == (before, False)
    renewed = await upgraded.renew(replace(wish, serving=before), silent)
    assert (renewed.folder, renewed.is_current) == (current.folder, True)
    assert before.exists(), "the way back, until its room is needed"


async def test_where_the_wanted_engine_takes_long_a_quick_one_serves_first(store: Store, tmp_path: Path) -> None:
    """This machine has no TensorRT, so the wanted build really fails here; the quick one must not know."""
    node, wish = preparer(store, machine=NO_TENSORRT_HERE), Wish(eyes(tmp_path))
    quick = await node.prepare(wish, silent)
    assert (quick.record["key"]["runtime"], quick.is_current) == ("onnxruntime", False)
    with pytest.raises(PreparationFailed, match="cannot load it") as failure:
        await node.renew(replace(wish, serving=quick.folder), silent)
    assert failure.value.is_final
    assert quick.folder.exists()


async def test_a_target_that_is_not_here_does_not_keep_a_model_from_serving(store: Store, tmp_path: Path) -> None:
    node, wish = preparer(store, ConvertSettings(target="tensorrt", nice=0)), Wish(eyes(tmp_path))
    quick = await node.prepare(wish, silent)
    assert not quick.is_current
    with pytest.raises(PreparationFailed, match="the target is tensorrt"):
        await node.renew(wish, silent)


async def test_a_torn_engine_is_removed_and_built_anew(store: Store, tmp_path: Path) -> None:
    wish = Wish(eyes(tmp_path))
    first = await preparer(store).prepare(wish, silent)
    whole = (first.folder / "model.onnx").read_bytes()
    (first.folder / "model.onnx").chmod(0o644)
    (first.folder / "model.onnx").write_bytes(whole[:-7])
    again = await preparer(store).prepare(wish, silent)
    assert (again.folder, again.is_current) == (first.folder, True)
    assert (again.folder / "model.onnx").read_bytes() == whole


def flip_a_bit(path: Path) -> bytes:
    """Damage that sizes do not show. Returns what was there. In a new file: the old one may be mapped as running code."""
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    return whole


async def test_an_engine_with_a_flipped_bit_is_removed_and_built_anew(store: Store, tmp_path: Path) -> None:
    wish = Wish(eyes(tmp_path))
    first = await preparer(store).prepare(wish, silent)
    whole = flip_a_bit(first.folder / "model.onnx")
    with pytest.raises(EngineError, match=r"model\.onnx is not the file that was published"):
        open_engine(first.folder)
    again = await preparer(store).prepare(wish, silent)
    assert again.is_current, "built, not found"
    assert (again.folder / "model.onnx").read_bytes() == whole
    open_engine(again.folder).close()


async def test_the_builder_does_not_take_a_damaged_engine_for_the_wanted_one(store: Store, tmp_path: Path) -> None:
    wish = Wish(eyes(tmp_path))
    first = await preparer(store).prepare(wish, silent)
    whole = flip_a_bit(first.folder / "model.onnx")
    again = await preparer(store).renew(wish, silent)
    assert (again.folder / "model.onnx").read_bytes() == whole


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="native engines need a compiler")
async def test_native_code_and_weights_with_a_flipped_bit_are_not_loaded(store: Store, tmp_path: Path) -> None:
    path = write_decoder(tmp_path / "tiny.gguf", Recipe())
    manifest = replace(manifest_from_mapping(generation()), files={"model": ModelFile(f"file:{path}", sha256_of(path))})
    wish = Wish(manifest, {"target": "native"})
    built = await preparer(store).prepare(wish, silent)
    for name in ("model.native", "decoder.so"):
        whole = flip_a_bit(built.folder / name)
        with pytest.raises(EngineError, match=f"{name} is not the file that was published"):
            open_generation_engine(built.folder)
        (built.folder / name).write_bytes(whole)
        open_generation_engine(built.folder).close()
    flip_a_bit(built.folder / "decoder.so")
    again = await preparer(store).prepare(wish, silent)
    assert again.is_current, "built, not found"
    open_generation_engine(again.folder).close()


async def test_a_damaged_artefact_is_fetched_again(store: Store, tmp_path: Path) -> None:
    path = write_decoder(tmp_path / "tiny.gguf", Recipe())
    manifest = replace(manifest_from_mapping(generation()), files={"model": ModelFile(f"file:{path}", sha256_of(path))})
    node = preparer(store)
    first = await node.prepare(Wish(manifest), silent)
    blob = store.find(manifest.files["model"])
    assert blob is not None
    node.locks.keep(())
    store.discard(first.folder)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:4000])
    again = await node.prepare(Wish(manifest), silent)
    assert again.folder == first.folder
    assert sha256_of(blob) == blob.name


async def test_without_its_sources_an_engine_serves_and_nothing_is_fetched(store: Store, tmp_path: Path) -> None:
    manifest = eyes(tmp_path)
    first = await preparer(store).prepare(Wish(manifest), silent)
    for blob in store.blob_path("").iterdir():
        store.discard(blob)
    (tmp_path / "eyes.onnx").unlink()
    offline = preparer(store)
    at_hand = await offline.prepare(Wish(manifest), silent)
    assert (await offline.renew(Wish(manifest, serving=at_hand.folder), silent)).folder == first.folder


async def test_what_cannot_be_fetched_says_so(store: Store, tmp_path: Path) -> None:
    manifest = eyes(tmp_path)
    (tmp_path / "eyes.onnx").unlink()
    with pytest.raises(PreparationFailed, match=r"eyes\.onnx does not exist"):
        await preparer(store).prepare(Wish(manifest), silent)


async def test_an_engine_that_is_not_the_model_is_made_only_where_it_is_accepted(store: Store, tmp_path: Path) -> None:
    manifest = eyes(tmp_path, max_score_delta=-1.0)
    with pytest.raises(PreparationFailed, match="not the model it was made from") as failure:
        await preparer(store).prepare(Wish(manifest), silent)
    assert failure.value.verdict["attempts"], "what was measured comes along"
    assert store.engines() == []
    accepting = preparer(store, ConvertSettings(accept_unverified=True, nice=0))
    built = await accepting.prepare(Wish(manifest), silent)
    assert built.record["verdict"]["passed"] is False
    with pytest.raises(PreparationFailed):
        await preparer(store).prepare(Wish(manifest), silent)
    ordered = await preparer(store).prepare(Wish(manifest, {"accept_unverified": True}), silent)
    assert ordered.folder == built.folder


async def test_what_is_neither_wanted_nor_in_use_makes_room(store: Store, tmp_path: Path) -> None:
    wanted, idle = eyes(tmp_path, "wanted", threshold=0.2), eyes(tmp_path, "idle")
    elsewhere = preparer(store)
    gone = (await elsewhere.prepare(Wish(idle), silent)).folder
    elsewhere.locks.keep({gone})
    elsewhere.locks.keep(())
    size = sum(engine.size_bytes for engine in store.engines("idle"))
    save(tmp_path / "wanted.onnx", detector(0.03))
    file = ModelFile(f"file:{tmp_path}/wanted.onnx", sha256_of(tmp_path / "wanted.onnx"), (tmp_path / "wanted.onnx").stat().st_size)
    wanted = replace(wanted, files={"model": file})
    pins = frozenset({"wanted", wanted.files["model"].sha256})
    node = preparer(store, budget_bytes=int(size * 2.5), pinned=lambda: pins)
    built = await node.prepare(Wish(wanted), silent)
    assert built.folder.exists()
    assert not gone.exists(), "the only thing that may go"


async def test_an_engine_that_is_held_is_not_taken_away(store: Store, tmp_path: Path) -> None:
    manifest = eyes(tmp_path)
    node = preparer(store)
    built = await node.prepare(Wish(manifest), silent)
    node.locks.keep({built.folder})
    with pytest.raises(StoreBusy):
        remove(store, manifest)
    node.locks.keep(())
    remove(store, manifest)
    assert not built.folder.exists()


async def test_a_cancelled_build_is_gone_within_a_second(store: Store, tmp_path: Path) -> None:
    path = write_decoder(tmp_path / "tiny.gguf", Recipe())
    manifest = replace(manifest_from_mapping(generation()), files={"model": ModelFile(f"file:{path}")})
    began_s = 0.0
    with anyio.CancelScope() as scope:

        def at_work(phase: str, fraction: float, message: str = "") -> None:
            nonlocal began_s
            if phase in ("convert", "verify") and not began_s:
                began_s = time.monotonic()
                scope.cancel()

        await preparer(store).prepare(Wish(manifest), at_work)
    assert scope.cancelled_caught
    assert time.monotonic() - began_s < 1.2
    assert list((store.root / "temporary").iterdir()) == []
    assert store.engines() == []


async def test_only_what_a_machine_does_not_have_moves_on_to_the_next_choice() -> None:
    native, graph = BuildChoice("native"), BuildChoice("onnxruntime")

    async def build(choice: BuildChoice) -> Built:
        if choice == native:
            raise PreparationFailed("it has adapters", code)
        return Built(Path("/graph"), {})

    code = "unsupported"
    assert (await first_built((native, graph), build)).folder == Path("/graph")
    code = "not_the_same_model"
    with pytest.raises(PreparationFailed, match="adapters"):
        await first_built((native, graph), build)


async def test_a_converter_that_cannot_run_is_a_failure_in_words(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text("import os\nos._exit(3)\n")
    assert os.environ["PYTHONPATH"]
    with pytest.raises(PreparationFailed, match="status 3 and no result"):
        await preparer(store).prepare(Wish(eyes(tmp_path)), silent)
