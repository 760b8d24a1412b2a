from __future__ import annotations

from typing import Any

import pytest

from models.manifest import DetectionManifest, EmbeddingManifest, ManifestError, manifest_digest, manifest_from_mapping
from models.record import to_mapping

EMBEDDING: dict[str, Any] = {
    "name": "tiny",
    "task": "embedding",
    "format": "onnx",
    "licence": "MIT",
    "summary": "",
    "files": {"model": {"source": "file:/models/tiny.onnx"}},
    "embedding": {"dimensions": 8, "max_tokens": 16},
}


def test_task_selects_the_type() -> None:
    manifest = manifest_from_mapping(EMBEDDING)
    assert isinstance(manifest, EmbeddingManifest)
    assert manifest.embedding.pooling == "mean"
    values = {**EMBEDDING, "task": "detection", "detection": {"height": 8, "width": 8, "labels": ["a"]}}
    del values["embedding"]
    detector = manifest_from_mapping(values)
    assert isinstance(detector, DetectionManifest)
    assert detector.detection.contract == "raw"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "poetry"}, r"task: 'poetry' is not one of generation, embedding, classification, detection"),
        ({"task": ["embedding"]}, r"task: \['embedding'\] is not one of"),
        ({"task": "generation"}, r"the table \[generation\] is missing"),
        ({"generation": {"context_tokens": 1}}, r"tiny: unknown field 'generation'"),
        ({"name": "../tiny"}, r"must match"),
        ({"name": "Tiny"}, r"must match"),
        ({"licence": ""}, r"licence is empty"),
        ({"files": {}}, r"no \[files\.\*\] table"),
        ({"files": {"model": {"source": "http://plain/x"}}}, r"files\.model\.source 'http://plain/x' is not"),
        ({"files": {"model": {"source": "/models/x"}}}, r"is not hf:"),
        ({"files": {"model": {"source": "hf:a b"}}}, r"is not hf:"),
        ({"files": {"model": {"source": "hf:a", "sha256": "AB"}}}, r"sha256 'AB' is not 64 lower-case hex digits"),
        ({"format": "pickle"}, r"'pickle' is not one of"),
        ({"embedding": {"dimensions": 8, "max_tokens": 16, "pool": "mean"}}, r"tiny\.embedding: unknown field 'pool'"),
    ],
)
def test_wrong_manifests_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        manifest_from_mapping({**EMBEDDING, **change})


def test_digest_follows_the_facts_and_not_their_order() -> None:
    digest = manifest_digest(manifest_from_mapping(EMBEDDING))
    assert digest == manifest_digest(manifest_from_mapping(dict(reversed(EMBEDDING.items()))))
    assert digest == manifest_digest(manifest_from_mapping(to_mapping(manifest_from_mapping(EMBEDDING))))
    changed = {**EMBEDDING, "embedding": {"dimensions": 8, "max_tokens": 17}}
    assert digest != manifest_digest(manifest_from_mapping(changed))
