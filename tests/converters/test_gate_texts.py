"""The gate on text models: a sentence encoder and a decoder with a fault in one step of the ladder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from converters import decoder_line, stateless_line
from converters.build import build
from converters.causal_model import CausalModel
from converters.decoder_graph import Form, Progress
from converters.decoder_line import DecoderLine
from converters.decoder_source import DecoderSource, Matrix
from converters.errors import ConversionError
from converters.line import Kind
from converters.lora import Adapter
from converters.onnx_from_causal_model import onnx_from_causal_model
from converters.onnxruntime_operators import OnnxRuntimeForm
from converters.quantised_blocks import Float
from converters.request import parse_request
from converters.stateless_line import ROUNDINGS, Recipe, StatelessLine
from models.catalog import load_catalog
from models.record import to_mapping
from tests.converters.manifests import classification, embedding, generation
from tests.converters.manifests import request as tiny_request
from tests.converters.test_lora import PROJECTIONS, files, shapes_of
from tests.converters.tiny_gguf import Recipe as Tiny
from tests.converters.tiny_gguf import write_decoder
from tests.converters.tiny_onnx import save, text_network
from tests.converters.tiny_transformers import weights, write_model
from tests.models.tasks.conftest import minilm as minilm

How = Callable[[NDArray[Any]], NDArray[Any]]


def scaled(values: NDArray[Any]) -> NDArray[Any]:
    return values * 1.05


def with_a_nan(values: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.arange(len(values)) == 0, np.nan, values)


def with_two_classes_swapped(values: NDArray[Any]) -> NDArray[Any]:
    return values[:, [1, 0, 2]]


def weight_of(operator: str, at: int = 0) -> Callable[[Any], str]:
    """The name of the weight of the node `at` of its kind."""
    return lambda model: str([node for node in model.graph.node if node.op_type == operator][at].input[1])


def spoiled(find: Callable[[Any], str], how: How) -> Kind:
    """The line of stateless models, whose first attempt at half precision has one weight that is not what it was."""

    def faulty(source: Path, target: Path, recipe: Recipe) -> Mapping[str, Any]:
        notes = ROUNDINGS["fp16"](source, target, recipe)
        if not recipe.step.keeps_fp32:
            model = onnx.load(str(target))
            (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == find(model)]
            values = numpy_helper.to_array(weight)
            weight.CopyFrom(numpy_helper.from_array(how(values).astype(values.dtype), weight.name))
            onnx.save(model, str(target))
        return notes

    return Kind(lambda job: StatelessLine(job, {**ROUNDINGS, "fp16": faulty}), stateless_line.converters, copies=5.0)


NORM = weight_of("LayerNormalization")


@pytest.mark.parametrize(
    ("find", "how", "reason"),
    [
        (NORM, scaled, "first at normed (LayerNormalization)"),
        (NORM, with_a_nan, "'logits' holds NaN"),
        (weight_of("MatMul", -1), with_two_classes_swapped, "agreement is"),
    ],
)
def test_a_faulty_classifier_is_refused_and_the_next_step_is_published(
    tmp_path: Path, find: Callable[[Any], str], how: How, reason: str
) -> None:
    source = save(tmp_path / "tiny.onnx", text_network("logits", 3))
    asked = {**tiny_request(classification(), tmp_path / "store", model=source), "options": {"precision": "fp16"}}
    kinds = {("onnx", "classification"): spoiled(find, how)}
    verdict = build(parse_request(json.dumps(asked).encode()), lambda phase, fraction, message: None, kinds).engine.record.verdict
    first, second = verdict["attempts"]
    assert (first["status"], second["status"], verdict["inputs"]) == ("failed", "passed", 16)
    assert reason in first["reason"]
    assert (second["figures"]["agreement"], verdict["task"]) == (1.0, "classification")
    assert first["worst"]["operator"] == ("MatMul" if how is with_two_classes_swapped else "LayerNormalization")


def test_an_encoder_that_holds_no_number_is_refused_and_the_next_step_is_published(tmp_path: Path) -> None:
    source = save(tmp_path / "tiny.onnx", text_network("last_hidden_state", 8))
    asked = {**tiny_request(embedding(), tmp_path / "store", model=source), "options": {"precision": "fp16"}}
    kinds = {("onnx", "embedding"): spoiled(NORM, with_a_nan)}
    verdict = build(parse_request(json.dumps(asked).encode()), lambda phase, fraction, message: None, kinds).engine.record.verdict
    first, second = verdict["attempts"]
    assert (first["status"], second["status"]) == ("failed", "passed")
    assert "holds NaN" in first["reason"]
    assert (first["worst"]["operator"], first["worst"]["relative_error"]) == ("LayerNormalization", None)


def test_a_faulty_encoder_is_refused_and_the_next_step_is_published(tmp_path: Path, minilm: Path) -> None:
    manifest = to_mapping(load_catalog().find("all-minilm-l6-v2"))
    sources = {"model": minilm / "model.onnx", "tokenizer": minilm / "tokenizer.json"}
    asked = {**tiny_request(manifest, tmp_path, **sources), "options": {"precision": "fp16"}}
    kinds = {("onnx", "embedding"): spoiled(weight_of("LayerNormalization", 6), scaled)}
    verdict = build(parse_request(json.dumps(asked).encode()), lambda phase, fraction, message: None, kinds).engine.record.verdict
    first, second = verdict["attempts"]
    assert (first["status"], second["status"], verdict["inputs"]) == ("failed", "passed", 17)
    assert first["worst"]["operator"] == "LayerNormalization"
    assert first["figures"]["min_cosine"] < 0.999 < second["figures"]["min_cosine"]
    assert first["worst"]["relative_error"] == pytest.approx(0.05, abs=0.03)
    assert second["figures"]["max_relative_error"] < 0.005


def test_few_texts_of_the_operator_are_topped_up_and_counted(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the quick brown fox\nand another line of text\n")
    asked = tiny_request(generation(), tmp_path / "store", model=write_decoder(tmp_path / "tiny.gguf", Tiny()))
    verdicts = []
    for calibration in ({}, {"calibration": str(texts)}):
        asked["options"] = {"precision": "fp32", **calibration}
        built = build(parse_request(json.dumps(asked).encode()), lambda phase, fraction, message: None)
        verdicts.append(built.engine.record.verdict)
    without, given = verdicts
    assert (without["own_inputs"], given["own_inputs"]) == (0, 2)
    assert given["inputs"] == without["inputs"] + 2
    assert given["figures"]["perplexity_source"] != without["figures"]["perplexity_source"], "they were looked at"


@dataclasses.dataclass(frozen=True)
class Changed:
    """Weights of which one is not what it was."""

    source: DecoderSource
    name: str
    how: How

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self.source.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def format(self, name: str) -> str:
        return self.source.format(name)

    def float32(self, name: str) -> Float:
        values = self.source.float32(name)
        return np.asarray(self.how(values), np.float32) if name == self.name else values

    def matrix(self, name: str) -> Matrix:
        return self.source.matrix(name)


@pytest.mark.parametrize("how", [scaled, with_a_nan])
def test_a_faulty_decoder_is_refused_and_the_next_step_is_published(tmp_path: Path, how: How) -> None:
    def faulty(model: CausalModel, folder: Path, form: Form, progress: Progress, adapters: Sequence[Adapter] = ()) -> None:
        if isinstance(form, OnnxRuntimeForm) and form.activations == "int8":
            model = dataclasses.replace(model, source=Changed(model.source, "blk.1.ffn_norm.weight", how))
        onnx_from_causal_model(model, folder, form, progress, adapters)

    kind = Kind(lambda job: DecoderLine(job, faulty), decoder_line.converters, copies=1.5)
    asked = tiny_request(generation(mean_kl=1e-3), tmp_path / "store", model=write_decoder(tmp_path / "tiny.gguf", Tiny()))
    asked["options"] = {"precision": "int8"}
    built = build(parse_request(json.dumps(asked).encode()), lambda phase, fraction, message: None, {("gguf", "generation"): kind})
    verdict = built.engine.record.verdict
    first, second = verdict["attempts"]
    assert (first["status"], second["status"], second["precision"]) == ("failed", "passed", "fp32")
    assert "mean_kl" in first["reason"]
    assert second["inputs"] >= 16
    if how is with_a_nan:
        assert first["worst"]["name"].startswith("blk.1.ffn_norm")
        assert first["worst"]["relative_error"] is None


@pytest.mark.parametrize("is_faulty", [False, True])
def test_each_adapter_has_to_be_proven_beside_the_model(tmp_path: Path, is_faulty: bool) -> None:
    """Nobody would see a wrong adapter in the answers of the model alone."""

    def write(model: CausalModel, folder: Path, form: Form, progress: Progress, adapters: Sequence[Adapter] = ()) -> None:
        law, poems = adapters
        if is_faulty:
            changes = {name: dataclasses.replace(change, up=change.up * np.float32(1.5)) for name, change in poems.changes.items()}
            poems = dataclasses.replace(poems, changes=changes)
        onnx_from_causal_model(model, folder, form, progress, (law, poems))

    sources = {path.stem: path for path in write_model(tmp_path / "source").values()}
    for name, parts in (("law", PROJECTIONS), ("poems", ("q_proj", "v_proj"))):
        found = files(tmp_path, name, shapes_of(weights(), parts), 4)
        sources |= {f"adapter.{name}.config": found.config, f"adapter.{name}.weights": found.weights}
    published = {role: {"source": f"file:/nowhere/{path.name}"} for role, path in sources.items()}
    manifest = {**generation(mean_kl=1e-3), "format": "transformers", "files": published}
    kind = Kind(lambda job: DecoderLine(job, write), decoder_line.converters, copies=1.5)
    asked = parse_request(json.dumps(tiny_request(manifest, tmp_path / "store", **sources)).encode())
    kinds = {("transformers", "generation"): kind}
    if is_faulty:
        with pytest.raises(ConversionError, match="adapter poems: mean_kl is"):
            build(asked, lambda phase, fraction, message: None, kinds)
        return
    built = build(asked, lambda phase, fraction, message: None, kinds)
    assert built.engine.record.verdict["passed"]
    assert built.engine.record.verdict["inputs"] >= 3 * 16
