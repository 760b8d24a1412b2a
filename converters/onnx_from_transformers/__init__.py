"""Hugging Face weights → ONNX in the contract of our tasks, through transformers and torch (`pip install 'hotspare[convert]'`).

The only home of these two: they are imported when something is exported, so everything else runs without them. All files are
untrusted: weights are read as numbers and never unpickled as code, code beside them is never run, nothing is fetched.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from converters.decoder_graph import Progress
from converters.errors import ConversionError, unsupported
from converters.graph_contract import Stateless
from converters.json_object import read_json_object
from converters.transformers_check import check_facts

# Part of the engine key: raise it with every change that changes what is written.
VERSION = 1
# 16 is the first with GridSample, 20 the last that the tracing exporter writes. 17 has LayerNormalization and is read by every TensorRT
# from 8.6 on; what older ones lack is written out later (onnx_from_onnx.GraphTarget).
OPSETS = range(16, 21)
OPSET = 17
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def onnx_from_transformers(files: Mapping[str, Path], manifest: Stateless, target: Path, opset: int, progress: Progress) -> Path:
    """Export to `target` (weights over 1 GiB into `{name}.data` beside it) and hold the graph against torch on made-up inputs.

    files  fetched files by their published names: config.json, model.safetensors or pytorch_model.bin, preprocessor_config.json
    graph  detection: `pixel_values [batch,3,height,width]` → `logits`, `pred_boxes`, height and width fixed where pictures are stretched;
           encoders: `input_ids`, `attention_mask`, if it has them `token_type_ids` [batch, sequence] → the manifest's output

    Raises ConversionError: `bad_request` where manifest and configuration differ, `unsupported`, `not_the_same_model`.
    """
    if opset not in OPSETS:
        raise ConversionError(f"opset {opset} cannot be written here; {OPSETS.start} to {OPSETS.stop - 1} can", "bad_request")
    weights = next((name for name in WEIGHTS if name in files), "")
    if not weights or CONFIG not in files:
        raise ConversionError(f"{manifest.name} needs {CONFIG} and one of {', '.join(WEIGHTS)} among its files; it has {', '.join(files)}")
    config = read_json_object(files[CONFIG], CONFIG)
    preprocessor = read_json_object(files[PREPROCESSOR], PREPROCESSOR) if PREPROCESSOR in files else None
    check_facts(manifest, config, preprocessor)
    progress(0.0, "load torch and transformers")
    try:
        export = importlib.import_module("converters.onnx_from_transformers.export")
    except ImportError as error:
        raise unsupported(
            f"exporting {manifest.name} needs torch and transformers ({error}): pip install 'hotspare[convert]', here or on another "
            "machine, and bring the ONNX file"
        ) from error
    path: Path = export.export(config, files[weights], weights, manifest, target, opset, progress)
    return path
