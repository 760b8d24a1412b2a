"""GGUF → a folder that the generation engine of ONNX Runtime opens."""

from __future__ import annotations

from pathlib import Path

from converters import onnx_from_causal_model
from converters.causal_model import model_from_gguf
from converters.decoder import Decoder
from converters.decoder_graph import Progress
from converters.decoder_source import DecoderSource
from converters.onnxruntime_operators import Activations, OnnxRuntimeForm

VERSION = onnx_from_causal_model.VERSION


def onnx_from_gguf(
    source: Path, folder: Path, activations: Activations, progress: Progress, context_tokens: int | None = None
) -> tuple[DecoderSource, Decoder]:
    """See `onnx_from_causal_model`; `context_tokens` shortens the model's context (and the RoPE tables with it). Raises ConversionError."""
    model = model_from_gguf(source, context_tokens)
    onnx_from_causal_model.onnx_from_causal_model(model, folder, OnnxRuntimeForm(activations), progress)
    return model.source, model.decoder
