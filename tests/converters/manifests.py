"""Manifests and requests for builds in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.manifest import DetectionManifest, EmbeddingManifest, manifest_from_mapping


def generation(**facts: Any) -> dict[str, Any]:
    return _manifest("generation", "gguf", {"context_tokens": 128, **facts}, "tiny.gguf")


def detection(**facts: Any) -> dict[str, Any]:
    values = {"height": 32, "width": 48, "labels": ["a", "b", "c"], "threshold": 0.1, **facts}
    return _manifest("detection", "onnx", values, "tiny.onnx")


def embedding(**facts: Any) -> dict[str, Any]:
    return _manifest("embedding", "onnx", {"dimensions": 8, "max_tokens": 64, **facts}, "tiny.onnx")


def classification(**facts: Any) -> dict[str, Any]:
    return _manifest("classification", "onnx", {"labels": ["a", "b", "c"], "max_tokens": 64, **facts}, "tiny.onnx")


def detection_manifest(**facts: Any) -> DetectionManifest:
    manifest = manifest_from_mapping(detection(**facts))
    assert isinstance(manifest, DetectionManifest)
    return manifest


def embedding_manifest(**facts: Any) -> EmbeddingManifest:
    manifest = manifest_from_mapping(embedding(**facts))
    assert isinstance(manifest, EmbeddingManifest)
    return manifest


def request(manifest: dict[str, Any], store: Path, **sources: Path) -> dict[str, Any]:
    return {"manifest": manifest, "sources": {role: str(path) for role, path in sources.items()}, "store": str(store)}


def _manifest(task: str, form: str, facts: dict[str, Any], name: str) -> dict[str, Any]:
    files = {"model": {"source": f"file:/nowhere/{name}"}}
    return {"name": f"tiny-{task}", "licence": "CC0-1.0", "summary": "test", "format": form, "task": task, "files": files, task: facts}
