"""Manifests out of configuration files, and manifests held against them. The files are as published, cut to what is read."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from converters.errors import ConversionError
from converters.json_object import JsonObject, read_json_object
from converters.manifest_from_transformers import manifest_from_transformers
from converters.onnx_from_transformers import OPSET, onnx_from_transformers
from converters.transformers_check import check_facts
from models.manifest import (
    ClassificationManifest,
    DetectionManifest,
    EmbeddingManifest,
    GenerationManifest,
    manifest_from_mapping,
)
from models.record import to_mapping

DETR = {"model_type": "detr", "architectures": ["DetrForObjectDetection"], "id2label": {"1": "cat", "0": "N/A", "2": "dog"}}
DETR_PICTURE = {
    "size": 800,
    "max_size": 1333,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
RT_DETR = {"model_type": "rt_detr", "architectures": ["RTDetrForObjectDetection"], "id2label": {"0": "sofa", "1": "cat"}}
RT_DETR_PICTURE = {"size": {"height": 640, "width": 480}, "do_normalize": False, "image_mean": [0.485, 0.456, 0.406]}
BERT = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 384, "max_position_embeddings": 512}
SST2 = {
    "model_type": "mobilebert",
    "architectures": ["MobileBertForSequenceClassification"],
    "id2label": {"0": "negative", "1": "positive"},
}


def folder_of(folder: Path, **files: Any) -> Path:
    """Writes each file as `{name}.json`, beside weights that nobody reads."""
    (folder / "model.safetensors").write_bytes(b"weights")
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_detr_in_the_form_before_2023(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# DETR\n")
    manifest = manifest_from_transformers(folder_of(tmp_path, config=DETR, preprocessor_config=DETR_PICTURE), "my-detr")
    assert isinstance(manifest, DetectionManifest)
    facts = manifest.detection
    assert (manifest.name, manifest.licence, manifest.format) == ("my-detr", "apache-2.0", "transformers")
    assert (facts.resize, facts.height, facts.width, facts.scores) == ("shortest_edge", 800, 1333, "softmax")
    assert facts.labels == ("N/A", "cat", "dog") and facts.mean == (0.485, 0.456, 0.406)
    assert {role: file.source for role, file in manifest.files.items()} == {
        "model": f"file:{tmp_path}/model.safetensors",
        "config": f"file:{tmp_path}/config.json",
        "preprocessor": f"file:{tmp_path}/preprocessor_config.json",
    }


def test_rt_detr_is_stretched_and_not_normalised(tmp_path: Path) -> None:
    manifest = manifest_from_transformers(folder_of(tmp_path, config=RT_DETR, preprocessor_config=RT_DETR_PICTURE), "x")
    assert isinstance(manifest, DetectionManifest)
    facts = manifest.detection
    assert (facts.resize, facts.height, facts.width, facts.scores) == ("stretch", 640, 480, "sigmoid")
    assert (facts.mean, facts.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_a_graph_of_one_size_gets_one(tmp_path: Path) -> None:
    config = {**DETR, "model_type": "deformable_detr", "architectures": ["DeformableDetrForObjectDetection"]}
    manifest = manifest_from_transformers(folder_of(tmp_path, config=config, preprocessor_config=DETR_PICTURE), "x")
    assert isinstance(manifest, DetectionManifest)
    assert (manifest.detection.resize, manifest.detection.height, manifest.detection.width) == ("stretch", 800, 1067)


def test_sentence_transformers_say_how_they_pool(tmp_path: Path) -> None:
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling")]
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 384}
    folder = folder_of(tmp_path, config=BERT, tokenizer="{}", modules=modules, sentence_bert_config={"max_seq_length": 256})
    folder_of(folder, **{"1_Pooling/config": pooling})
    manifest = manifest_from_transformers(folder, "x")
    assert isinstance(manifest, EmbeddingManifest)
    facts = manifest.embedding
    assert (facts.dimensions, facts.max_tokens, facts.pooling, facts.normalise) == (384, 256, "first", False)


def test_a_classifier_and_a_language_model(tmp_path: Path) -> None:
    manifest = manifest_from_transformers(folder_of(tmp_path, config={**SST2, "max_position_embeddings": 128}, tokenizer="{}"), "x")
    assert isinstance(manifest, ClassificationManifest)
    assert manifest.classification.labels == ("negative", "positive") and manifest.classification.max_tokens == 128
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 131072}
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.2, "top_p": 0, "top_k": 20}))
    language = manifest_from_transformers(tmp_path, "x")
    assert isinstance(language, GenerationManifest)
    assert (language.generation.temperature, language.generation.top_p) == (0.2, 1.0)
    assert language.generation.context_tokens == 4096 and set(language.files) == {
        "model", "config", "tokenizer", "shard_1", "generation_config",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config": {"model_type": "segformer", "architectures": ["SegformerModel"]}}, "not exported here"),
        ({"config": DETR}, "no preprocessor_config.json"),
        ({"config": BERT}, "no tokenizer.json"),
        ({"config": {**DETR, "id2label": {"0": "a", "2": "b"}}, "preprocessor_config": DETR_PICTURE}, "id2label numbers"),
        ({"config": DETR, "preprocessor_config": {**DETR_PICTURE, "size": 10**9}}, "not within"),
        ({"config": DETR, "preprocessor_config": {**DETR_PICTURE, "image_std": [0, 1, 1]}}, "above zero"),
        ({"config": BERT, "tokenizer": "{}", "modules": [{"type": "x.Dense"}]}, "Dense"),
        ({"config": "[]"}, "no JSON object"),
        ({"config": {"model_type": ["bert"]}}, "not a text"),
    ],
)
def test_what_cannot_be_told_is_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=message):
        manifest_from_transformers(folder_of(tmp_path, **files), "x")


def test_an_index_that_points_outside_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    folder_of(tmp_path, config=config, tokenizer="{}")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ConversionError, match="not a file beside it"):
        manifest_from_transformers(tmp_path, "x")


def test_its_own_manifest_fits_a_model(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config=DETR, preprocessor_config=DETR_PICTURE)
    manifest = manifest_from_transformers(folder, "x")
    assert isinstance(manifest, DetectionManifest)
    check_facts(manifest, read_json_object(folder / "config.json"), read_json_object(folder / "preprocessor_config.json"))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"labels": ["N/A", "cat"]}, "2 classes.*3 classes"),
        ({"labels": ["cat", "dog", "N/A"]}, r"labels\[0\]"),
        ({"scores": "sigmoid"}, "scores"),
        ({"resize": "stretch"}, "resize"),
        ({"height": 640}, "640 × 1333"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean"),
        ({"contract": "deploy"}, "contract"),
    ],
)
def test_a_manifest_that_says_otherwise_is_refused(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config=DETR, preprocessor_config=DETR_PICTURE)
    values = to_mapping(manifest_from_transformers(folder, "x"))
    manifest = manifest_from_mapping({**values, "detection": {**values["detection"], **facts}})
    assert isinstance(manifest, DetectionManifest)
    with pytest.raises(ConversionError, match=message):
        check_facts(manifest, read_json_object(folder / "config.json"), read_json_object(folder / "preprocessor_config.json"))


def test_a_manifest_may_rename_classes_but_not_move_them() -> None:
    values = {"name": "x", "licence": "x", "summary": "", "format": "transformers", "files": {"model": {"source": "file:/x"}}}
    facts = {"labels": ["bad", "good"], "max_tokens": 64}
    manifest = manifest_from_mapping({**values, "task": "classification", "classification": facts})
    assert isinstance(manifest, ClassificationManifest)
    check_facts(manifest, JsonObject("config.json", SST2), None)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is here")
def test_without_torch_an_export_says_what_to_install(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config=DETR, preprocessor_config=DETR_PICTURE)
    manifest = manifest_from_transformers(folder, "x")
    assert isinstance(manifest, DetectionManifest)
    files = {path.name: path for path in folder.iterdir()}
    with pytest.raises(ConversionError, match=r"pip install 'hotspare\[convert\]'"):
        onnx_from_transformers(files, manifest, tmp_path / "out.onnx", OPSET, lambda fraction, message: None)
