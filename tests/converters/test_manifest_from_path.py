"""Manifests for what somebody points at: files with all facts, files without, and a hub."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from converters.errors import ConversionError
from converters.manifest_from_hub import manifest_from_hub
from converters.manifest_from_path import manifest_from_path, manifest_toml, model_name, parse_given
from models.catalog import read_manifest
from models.durable import sha256_of
from models.manifest import ClassificationManifest, DetectionManifest, EmbeddingManifest, GenerationManifest
from models.sources import NotThere, fetch
from models.store import open_store
from tests.converters.tiny_gguf import Recipe, write_decoder
from tests.converters.tiny_onnx import detector, encoder, save
from tests.converters.tiny_transformers import write_model
from tests.models.sources.file_server import FileServer, Served, file_server

CAUSAL = {"architectures": ["LlamaForCausalLM"]}


def graph(path: Path, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], **properties: str) -> Path:
    """A graph of these shapes that computes nothing: only its form is read."""
    value = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    made = helper.make_graph(
        [helper.make_node("Identity", [next(iter(inputs))], [name]) for name in outputs],
        "form",
        [value(name, shape=shape) for name, shape in inputs.items()],
        [value(name, shape=shape) for name, shape in outputs.items()],
    )
    model = helper.make_model(made)
    helper.set_model_props(model, properties)
    onnx.save(model, str(path))
    return path


def test_a_gguf_tells_all(tmp_path: Path) -> None:
    metadata = {"general.name": "Tiny", "general.license": "apache-2.0"}
    path = write_decoder(tmp_path / "Tiny Chat-Q4_1.gguf".replace(" ", "-"), Recipe(metadata=metadata))
    manifest = manifest_from_path(path)
    assert isinstance(manifest, GenerationManifest)
    assert (manifest.name, manifest.licence, manifest.format) == ("tiny-chat-q4_1", "apache-2.0", "gguf")
    assert manifest.generation.context_tokens == 128
    file = manifest.files["model"]
    assert (file.source, file.sha256, file.size_bytes) == (f"file:{path}", sha256_of(path), path.stat().st_size)


def test_a_detector_tells_its_sizes_and_how_many_classes_it_has(tmp_path: Path) -> None:
    manifest = manifest_from_path(save(tmp_path / "eyes.onnx", detector()), "my-eyes")
    assert isinstance(manifest, DetectionManifest)
    facts = manifest.detection
    assert (manifest.name, facts.height, facts.width, facts.labels) == ("my-eyes", 32, 48, ("0", "1", "2"))
    assert (facts.contract, facts.scores) == ("raw", "sigmoid")


def test_names_of_classes_beside_the_file_win_and_tell_what_the_last_column_is(tmp_path: Path) -> None:
    path = save(tmp_path / "eyes.onnx", detector())
    (tmp_path / "labels.txt").write_text("parcel\nbottle\n\n")
    manifest = manifest_from_path(path)
    assert isinstance(manifest, DetectionManifest)
    assert (manifest.detection.labels, manifest.detection.scores) == (("parcel", "bottle"), "softmax")


@pytest.mark.parametrize("names", ['["a", "b", "c"]', "{0: 'a', 1: 'b', 2: 'c'}", '{"1": "b", "0": "a", "2": "c"}'])
def test_names_of_classes_in_the_files_own_notes(tmp_path: Path, names: str) -> None:
    raw = graph(tmp_path / "m.onnx", {"pixel_values": [1, 3, 64, 96]}, {"logits": [1, 9, 3], "pred_boxes": [1, 9, 4]}, names=names)
    manifest = manifest_from_path(raw)
    assert isinstance(manifest, DetectionManifest)
    assert manifest.detection.labels == ("a", "b", "c")


@pytest.mark.parametrize("names", ["{'a'", "7", "__import__('os')", "{0: 'a', 5: 'b'}", "[" * 5000])
def test_notes_that_are_no_names_are_not_taken(tmp_path: Path, names: str) -> None:
    raw = graph(tmp_path / "m.onnx", {"pixel_values": [1, 3, 64, 96]}, {"logits": [1, 9, 2], "pred_boxes": [1, 9, 4]}, names=names)
    manifest = manifest_from_path(raw)
    assert isinstance(manifest, DetectionManifest)
    assert manifest.detection.labels == ("0", "1")


DEPLOY = ({"images": ["N", 3, "h", "w"], "orig_target_sizes": ["N", 2]}, {"labels": ["N", 9], "boxes": ["N", 9, 4], "scores": ["N", 9]})


def test_what_no_file_tells_is_asked_for_by_its_field(tmp_path: Path) -> None:
    path = graph(tmp_path / "m.onnx", *DEPLOY)
    with pytest.raises(ConversionError, match=r"detection\.height and detection\.width and detection\.labels.*labels\.txt") as refusal:
        manifest_from_path(path)
    assert refusal.value.code == "bad_request"
    given = dict(map(parse_given, ["detection.height=320", "detection.width=640", 'detection.labels=["a", "b"]', "licence=MIT"]))
    manifest = manifest_from_path(path, given=given)
    assert isinstance(manifest, DetectionManifest)
    facts = manifest.detection
    assert (facts.contract, facts.height, facts.width, facts.labels, manifest.licence) == ("deploy", 320, 640, ("a", "b"), "MIT")


def test_an_encoder_needs_its_tokenizer(tmp_path: Path) -> None:
    path = save(tmp_path / "words.onnx", encoder())
    given = {"embedding.max_tokens": 64}
    with pytest.raises(ConversionError, match=r"tokenizer\.json"):
        manifest_from_path(path, given=given)
    (tmp_path / "tokenizer.json").write_text("{}")
    manifest = manifest_from_path(path, given=given)
    assert isinstance(manifest, EmbeddingManifest)
    assert (manifest.embedding.dimensions, manifest.embedding.output, set(manifest.files)) == (
        8,
        "last_hidden_state",
        {"model", "tokenizer"},
    )


def test_a_classifier_tells_its_labels(tmp_path: Path) -> None:
    path = graph(tmp_path / "m.onnx", {"input_ids": ["N", "T"]}, {"logits": ["N", 2]})
    config = {"model_type": "bert", "max_position_embeddings": 512, "id2label": {"0": "negative", "1": "positive"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    manifest = manifest_from_path(path)
    assert isinstance(manifest, ClassificationManifest)
    assert (manifest.classification.labels, manifest.classification.max_tokens) == (("negative", "positive"), 512)


def test_weights_in_a_file_of_their_own_belong_to_the_model(tmp_path: Path) -> None:
    manifest = manifest_from_path(save(tmp_path / "eyes.onnx", detector(), external="eyes.weights"))
    assert manifest.files["data_1"].source == f"file:{tmp_path}/eyes.weights"


def test_a_folder_of_a_hub(tmp_path: Path) -> None:
    write_model(tmp_path / "Tiny", changes=CAUSAL)
    manifest = manifest_from_path(tmp_path / "Tiny", given={"generation.context_tokens": 64})
    assert isinstance(manifest, GenerationManifest)
    assert (manifest.name, manifest.generation.context_tokens) == ("tiny", 64)
    assert all(file.sha256 and file.size_bytes for file in manifest.files.values())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "nothing.onnx", "no .gguf or .onnx file"),
        (lambda folder: folder / "notes.txt", "no .gguf or .onnx file"),
        (lambda folder: folder, r"config\.json"),
        (lambda folder: graph(folder / "m.onnx", {"x": [1]}, {"y": [1]}), "the form of no task here"),
        (lambda folder: graph(folder / "m.onnx", {"input_ids": [1, 8]}, {"y": [1]}), "neither logits nor"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, make: Any, said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        manifest_from_path(make(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no graph", b"GGUF"])
@pytest.mark.parametrize("name", ["m.onnx", "m.gguf"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError):
        manifest_from_path(tmp_path / name)


@pytest.mark.parametrize("field", ["detection.colour=1", "generation.context_tokens=4", "files.model=x", "name=Big Name"])
def test_a_field_that_is_none_is_refused(tmp_path: Path, field: str) -> None:
    path = save(tmp_path / "eyes.onnx", detector())
    with pytest.raises(ConversionError, match=r"colour|no field|name"):
        manifest_from_path(path, given=dict([parse_given(field)]))


@pytest.mark.parametrize("text", ["height", "=4", "a.b.c=4", "A=4"])
def test_an_argument_that_gives_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConversionError, match="FIELD=VALUE"):
        parse_given(text)


def test_a_path_with_a_space_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my models").mkdir()
    with pytest.raises(ConversionError, match="space"):
        manifest_from_path(save(tmp_path / "my models" / "eyes.onnx", detector()))


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    manifest = manifest_from_path(save(tmp_path / "eyes.onnx", detector()))
    strange = replace(manifest, summary='a "quoted" \\ line\n\x7f\x01 ü 猫', aliases=("one", "two"))
    (tmp_path / "eyes.toml").write_text(manifest_toml(strange), encoding="utf-8")
    assert read_manifest(tmp_path / "eyes.toml") == strange


def test_a_name_has_letters() -> None:
    assert model_name("My Model (v2).Q4_K") == "my-model-v2-.q4_k"
    with pytest.raises(ConversionError, match="gives no name"):
        model_name("模型")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with file_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HOTSPARE_MIRROR", raising=False)
        yield server


def publish(hub: FileServer, repository: str, revision: str, files: dict[str, bytes]) -> None:
    hub.files.update({f"/{repository}/resolve/{revision}/{name}": Served(body) for name, body in files.items()})


def test_a_repository_of_a_hub(hub: FileServer, tmp_path: Path) -> None:
    written, store = write_model(tmp_path / "source", changes=CAUSAL), open_store(tmp_path / "state")
    readme = b"---\nlicense: mit\n---\n"
    publish(hub, "owner/Tiny-Chat", "v1", {**{name: path.read_bytes() for name, path in written.items()}, "README.md": readme})
    manifest = manifest_from_hub("hf:owner/Tiny-Chat@v1", store, lambda file: fetch(file, store))
    assert (manifest.name, manifest.task, manifest.licence) == ("tiny-chat", "generation", "mit")
    assert manifest.files["model"].source == "hf:owner/Tiny-Chat@v1/model.safetensors"
    assert manifest.files["tokenizer"].source == "hf:owner/Tiny-Chat@v1/tokenizer.json"
    assert all(store.find(file) is not None for file in manifest.files.values())
    assert list((store.root / "temporary").iterdir()) == []


def test_one_file_of_a_repository_and_what_lies_beside_it(hub: FileServer, tmp_path: Path) -> None:
    path, store = save(tmp_path / "eyes.onnx", detector()), open_store(tmp_path / "state")
    publish(hub, "owner/eyes", "main", {"onnx/eyes.onnx": path.read_bytes(), "labels.txt": b"parcel\nbottle\nball\n"})
    manifest = manifest_from_hub("hf:owner/eyes/onnx/eyes.onnx", store, lambda file: fetch(file, store))
    assert isinstance(manifest, DetectionManifest)
    assert manifest.detection.labels == ("parcel", "bottle", "ball")
    assert manifest.files["model"].source == "hf:owner/eyes@main/onnx/eyes.onnx"


def test_a_repository_without_a_model_folder_asks_for_a_file(hub: FileServer, tmp_path: Path) -> None:
    store = open_store(tmp_path / "state")
    for text in ("hf:owner/nothing", "hf:owner/nothing/m.gguf"):
        with pytest.raises(NotThere, match="owner/nothing@main"):
            manifest_from_hub(text, store, lambda file: fetch(file, store))
    for text in ("hf:owner", "hf:owner/name@", "hf:owner/name@v/../x"):
        with pytest.raises((ConversionError, Exception), match="hf:"):
            manifest_from_hub(text, store, lambda file: fetch(file, store))


def test_names_in_an_index_stay_in_the_folder(hub: FileServer, tmp_path: Path) -> None:
    written, store = write_model(tmp_path / "source", changes=CAUSAL), open_store(tmp_path / "state")
    index = json.dumps({"weight_map": {"a": "../../../escaped.safetensors"}}).encode()
    files = {name: path.read_bytes() for name, path in written.items() if path.suffix == ".json"}
    publish(hub, "owner/evil", "main", {**files, "model.safetensors.index.json": index, "../../../escaped.safetensors": b"x"})
    with pytest.raises(ConversionError, match="no name of a file"):
        manifest_from_hub("hf:owner/evil", store, lambda file: fetch(file, store))
    assert not list(tmp_path.rglob("escaped*"))
