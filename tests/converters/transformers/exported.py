"""Writes the graphs of tests/converters/exported: python -m tests.converters.transformers.exported"""

from __future__ import annotations

import tempfile
from pathlib import Path

from converters.onnx_from_transformers import onnx_from_transformers
from models.manifest import GenerationManifest
from tests.converters.exported import DETECTORS, MODELS, keep
from tests.converters.transformers.tiny_models import detection_facts, files_of, manifest_for, save_detector, save_encoder

# JetPack 5 reads nothing newer.
OPSET = 17


def export_now(model_type: str, folder: Path) -> Path:
    if model_type in DETECTORS:
        save_detector(model_type, folder / "source")
        manifest = manifest_for("detection", **detection_facts(model_type))
    else:
        save_encoder(model_type, folder / "source", is_classifier=True)
        manifest = manifest_for("classification")
    assert not isinstance(manifest, GenerationManifest)
    return onnx_from_transformers(files_of(folder / "source"), manifest, folder / "model.onnx", OPSET, lambda fraction, message: None)


if __name__ == "__main__":
    for each in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            keep(export_now(each, Path(scratch)), each)
