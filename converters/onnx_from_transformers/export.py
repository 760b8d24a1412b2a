"""One model of transformers traced into an ONNX graph, and the graph held against the model.

The tracing exporter (`dynamo=False`), not the newer one: it writes the operator set it is asked for (the other left RT-DETR at 18 when
asked for 17), names of inputs and axes are ours, it needs no onnxscript, and every family here comes out equal to torch.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from converters.decoder_graph import Progress
from converters.errors import ConversionError, unsupported
from converters.graph_contract import Stateless
from converters.json_object import JsonObject
from converters.onnx_from_transformers.cleaned import write_cleaned
from converters.onnx_from_transformers.loading import load_model, threads
from models.manifest import ClassificationManifest, DetectionManifest

THREADS = 2
BATCH, SEQUENCE = 2, 16
# Sizes that a graph for all sizes is traced and tried with; not square, for a swap of sides would not be seen.
TRACED, TRIED = (256, 320), (352, 288)
# Queries are chosen by their scores, so two equal ones may change places, and a few near the edge be others.
CLOSE, CLOSE_SHARE = 1e-2, 0.9
ENCODER_DELTA = 1e-3


class Detects(torch.nn.Module):  # type: ignore[misc]  # torch is not there when types are checked
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Any) -> Any:
        # Without a mask the model makes one of ones, from the size of the picture.
        found = self.model(pixel_values=pixel_values, return_dict=True)
        return found.logits, found.pred_boxes


class Encodes(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, model: Any, field: str, has_types: bool) -> None:
        super().__init__()
        self.model, self.field, self.has_types = model, field, has_types

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
        more = {"token_type_ids": token_type_ids} if self.has_types else {}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **more)[self.field]


@dataclass(frozen=True)
class Tracing:
    """`tried`: further inputs that the graph must answer as the model does."""

    module: Any
    inputs: dict[str, Any]
    tried: list[dict[str, Any]]
    outputs: list[str]
    axes: dict[str, dict[int, str]]


def export(config: JsonObject, weights: Path, name: str, manifest: Stateless, target: Path, opset: int, progress: Progress) -> Path:
    """See `onnx_from_transformers`."""
    threads(THREADS)
    progress(0.1, f"read {name}")
    model = load_model(config, weights, name, manifest.task)
    tracing = _detection(model, manifest) if isinstance(manifest, DetectionManifest) else _encoder(model, manifest)
    # Whatever ends this before its last line leaves no graph behind.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        graph = Path(folder, target.name)
        progress(0.3, "trace the model")
        _trace(tracing, graph, opset, manifest.name)
        progress(0.7, "clean the graph")
        written = write_cleaned(graph, tracing.axes)
        progress(0.8, "hold the graph against torch")
        _hold_against(tracing, graph, manifest)
        for path in reversed(written):
            path.replace(target.with_name(path.name))
    return target


def _detection(model: Any, manifest: DetectionManifest) -> Tracing:
    facts = manifest.detection
    is_fixed = facts.has_one_size
    traced, tried = ((facts.height, facts.width),) * 2 if is_fixed else (TRACED, TRIED)
    axes = {0: "batch"} if is_fixed else {0: "batch", 2: "height", 3: "width"}
    rows = {"logits": {0: "batch"}, "pred_boxes": {0: "batch"}}
    # A module in training mode anywhere would bring the whole model there when the exporter has ended.
    return Tracing(
        Detects(model).eval(), _pictures(BATCH, traced), [_pictures(1, tried)], ["logits", "pred_boxes"], {"pixel_values": axes, **rows}
    )


def _pictures(count: int, size: tuple[int, int]) -> dict[str, Any]:
    coarse = torch.rand((count, 3, 6, 8), generator=torch.Generator().manual_seed(count))
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return {"pixel_values": smooth + 0.1 * torch.rand(smooth.shape, generator=torch.Generator().manual_seed(7))}


def _encoder(model: Any, manifest: Stateless) -> Tracing:
    is_classifier = isinstance(manifest, ClassificationManifest)
    output = manifest.classification.output if isinstance(manifest, ClassificationManifest) else manifest.embedding.output  # type: ignore[union-attr]
    has_types = getattr(model.config, "type_vocab_size", 0) > 1 and model.config.model_type not in ("mpnet", "distilbert")
    inputs = _texts(model, BATCH, SEQUENCE, has_types)
    axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    axes[output] = {0: "batch"} if is_classifier else {0: "batch", 1: "sequence"}
    module = Encodes(model, "logits" if is_classifier else "last_hidden_state", has_types).eval()
    return Tracing(module, inputs, [_texts(model, 1, 5, has_types), _texts(model, 3, 23, has_types)], [output], axes)


def _texts(model: Any, rows: int, tokens: int, has_types: bool) -> dict[str, Any]:
    ids = torch.randint(2, min(1000, model.config.vocab_size), (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    mask[-1, tokens - tokens // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask, **({"token_type_ids": torch.zeros_like(ids)} if has_types else {})}


def _trace(tracing: Tracing, target: Path, opset: int, name: str) -> None:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of each size that becomes a number, which is what is meant
            torch.onnx.export(
                tracing.module,
                tuple(tracing.inputs.values()),
                str(target),
                input_names=list(tracing.inputs),
                output_names=tracing.outputs,
                dynamic_axes=tracing.axes,
                opset_version=opset,
                dynamo=False,
            )
    except Exception as error:  # torch's many, and those of the model's own code
        raise unsupported(f"{name}: torch {torch.__version__} cannot trace the model: {type(error).__name__}: {error}") from error


def _hold_against(tracing: Tracing, target: Path, manifest: Stateless) -> None:
    try:
        onnx.checker.check_model(str(target))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
        pairs = [_answers(tracing, session, inputs) for inputs in (tracing.inputs, *tracing.tried)]
    except Exception as error:  # the checker's and the runtime's exceptions share no parent
        raise ConversionError(f"{manifest.name}: the exported graph does not run: {error}", "not_the_same_model") from error
    for number, (expected, found) in enumerate(pairs):
        reason = _queries_differ(expected, found) if isinstance(manifest, DetectionManifest) else _values_differ(expected, found)
        if reason:
            raise ConversionError(
                f"{manifest.name}: on input {number} the exported graph is not the model: {reason}; report this with the model's name, or "
                "export it on another version of torch or transformers (weights that were never trained leave the order of queries open)",
                "not_the_same_model",
            )


def _answers(tracing: Tracing, session: Any, inputs: dict[str, Any]) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    with torch.no_grad():
        expected = tracing.module(*inputs.values())
    values = [each.numpy() for each in (expected if isinstance(expected, tuple) else (expected,))]
    return values, session.run(tracing.outputs, {name: value.numpy() for name, value in inputs.items()})


def _queries_differ(expected: list[NDArray[Any]], found: list[NDArray[Any]]) -> str:
    """Empty when nearly every query of the model has a twin among those of the graph."""
    model, graph = (np.concatenate([logits / (1 + np.abs(logits).max()), boxes], axis=-1) for logits, boxes in (expected, found))
    if model.shape != graph.shape:
        return f"outputs of shape {list(graph.shape)} instead of {list(model.shape)}"
    nearest = np.abs(model[:, :, None] - graph[:, None]).max(axis=-1).min(axis=-1)
    share = float(np.mean(nearest <= CLOSE))
    return "" if share >= CLOSE_SHARE else f"{share:.0%} of its queries are the model's, {CLOSE_SHARE:.0%} are asked"


def _values_differ(expected: list[NDArray[Any]], found: list[NDArray[Any]]) -> str:
    delta = float(np.abs(expected[0] - found[0]).max() / (1 + np.abs(expected[0]).max()))
    return "" if delta <= ENCODER_DELTA else f"values differ by {delta:.2g} of their range, {ENCODER_DELTA:g} is allowed"
