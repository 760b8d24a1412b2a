"""A causal language model → a folder that a generation engine opens: graph, weights, tokenizer, chat template, facts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from converters.causal_model import CausalModel
from converters.decoder_graph import Form, Progress, write_decoder_graph
from converters.generation_folder import weight_formats, write_beside
from converters.lora import Adapter
from converters.onnxruntime_operators import OnnxRuntimeForm

# Part of the engine key: raise it with every change that changes what is written.
VERSION = 3

log = logging.getLogger(__name__)


def onnx_from_causal_model(model: CausalModel, folder: Path, form: Form, progress: Progress, adapters: Sequence[Adapter] = ()) -> None:
    """Write `model.onnx`, `model.onnx.data`, `tokenizer.json`, `chat_template.jinja` (if there is one) and `generation.json`.

    `adapters` are kept apart: the graph takes the number of one for each row, counted from 1 in this order. Raises ConversionError.
    """
    formats = {"F16", "BF16"} & set(weight_formats(model.source))
    if isinstance(form, OnnxRuntimeForm) and formats:
        log.info("weights stored as %s are multiplied in float32", ", ".join(sorted(formats)))
    write_decoder_graph(model.source, model.decoder, folder, form, progress, adapters)
    notes = {"activations": form.activations} if isinstance(form, OnnxRuntimeForm) else {"compute": form.compute}
    write_beside(model, folder, notes, [adapter.name for adapter in adapters])
    progress(1.0, "written")
