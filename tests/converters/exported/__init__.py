"""Models whose graphs only torch can write, exported once: what builds plans of them needs it not.

Small models with random weights, as `tests/converters/transformers/exported.py` wrote them; `make test-convert` holds them to what the
exporter writes now.
"""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

DETECTORS = ("rt_detr", "d_fine")
MODELS = (*DETECTORS, "mobilebert")
PLACE = Path(__file__).parent


def exported(model_type: str, path: Path) -> Path:
    """Writes the graph of a model to `path`."""
    path.write_bytes(lzma.decompress((PLACE / f"{model_type}.onnx.xz").read_bytes()))
    return path


def thinned(graph: Path) -> Any:
    """A graph with the upper halves of its float32 weights: random bits do not compress."""
    model = onnx.load(str(graph))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            bits = numpy_helper.to_array(tensor).view(np.uint32) & np.uint32(0xFFFF0000)
            tensor.CopyFrom(numpy_helper.from_array(bits.view(np.float32), tensor.name))
    return model


def keep(graph: Path, model_type: str) -> None:
    content = thinned(graph).SerializeToString(deterministic=True)
    (PLACE / f"{model_type}.onnx.xz").write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
