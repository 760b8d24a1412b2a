"""Adapters: merged, kept apart, and the formula of the paper written out are one and the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from converters.causal_model import CausalModel, model_from_gguf, model_from_transformers
from converters.decoder_graph import Form
from converters.decoder_session import DecoderSession
from converters.errors import ConversionError
from converters.lora import Adapter, AdapterFiles, MergedSource, adapter_files, read_adapter
from converters.onnx_from_causal_model import onnx_from_causal_model
from converters.onnxruntime_operators import OnnxRuntimeForm
from converters.reference import ReferenceDecoder
from converters.standard_operators import StandardForm
from models.engines import EngineError, EngineOptions, SlotTokens
from models.engines.onnx import open_generation_engine
from tests.converters.tiny_gguf import Recipe, write_decoder
from tests.converters.tiny_transformers import VOCABULARY, adapter_tensors, weights, write_model, write_safetensors

TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, 20).tolist()
FORMS: list[Form] = [OnnxRuntimeForm(), StandardForm("float32")]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def silent(fraction: float, message: str) -> None:
    del fraction, message


def files(folder: Path, name: str, shapes: dict[str, tuple[int, int]], rank: int, **config: Any) -> AdapterFiles:
    tensors = adapter_tensors(shapes, rank, seed=len(name) + rank)
    described = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", **config}
    (folder / f"{name}.json").write_text(json.dumps(described), encoding="utf-8")
    return AdapterFiles(name, folder / f"{name}.json", write_safetensors(folder / f"{name}.safetensors", tensors))


def shapes_of(tensors: dict[str, NDArray[Any]], parts: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    return {name.removesuffix(".weight"): values.shape for name, values in tensors.items() if name.split(".")[-2] in parts}


def two_adapters(folder: Path, model: CausalModel) -> list[Adapter]:
    base = weights()
    first = files(folder, "law", shapes_of(base, PROJECTIONS), 4)
    second = files(folder, "poems", shapes_of(base, ("q_proj", "v_proj", "down_proj")), 2, use_rslora=True)
    return [read_adapter(each, model.source) for each in (first, second)]


def engine_folder(model: CausalModel, folder: Path, form: Form, adapters: list[Adapter]) -> Path:
    folder.mkdir()
    onnx_from_causal_model(model, folder, form, silent, adapters)
    return folder


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_with_different_adapters_in_one_batch_equal_each_merged(tmp_path: Path, form: Form) -> None:
    model = model_from_transformers(write_model(tmp_path / "source"))
    adapters = two_adapters(tmp_path, model)
    session = DecoderSession(engine_folder(model, tmp_path / "engine", form, adapters), model.decoder, rows=4)
    chosen = [2, 0, 1, 2]
    prompts = [TOKENS, TOKENS, TOKENS, TOKENS[::-1]]
    first = session.step(prompts, [0] * 4, len(TOKENS), adapters=chosen)
    second = session.step([[5]] * 4, [len(TOKENS)] * 4, adapters=chosen)
    answers = []
    for row, number in enumerate(chosen):
        source = MergedSource(model.source, model.decoder, adapters[number - 1]) if number else model.source
        reference = ReferenceDecoder(source, model.decoder)
        expected = np.concatenate([reference.step(prompts[row]), reference.step([5])])
        np.testing.assert_allclose(np.concatenate([first[row], second[row]]), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        answers.append(expected)
    assert all(np.abs(answers[one] - answers[1]).max() > 0.1 * np.abs(answers[1]).max() for one in (0, 2))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_merged_at_conversion_equals_the_formula(tmp_path: Path, form: Form) -> None:
    """W + alpha / r · B A (alpha / sqrt(r) for rank-stabilised ones), on the tensors as peft stores them."""
    base = weights()
    model = model_from_transformers(write_model(tmp_path / "source", tensors=base))
    for adapter, rank, scale in zip(two_adapters(tmp_path, model), (4, 2), (8 / 4, 4 / np.sqrt(2)), strict=True):
        stored = adapter_tensors(
            shapes_of(base, PROJECTIONS if rank == 4 else ("q_proj", "v_proj", "down_proj")), rank, len(adapter.name) + rank
        )
        changed = dict(base)
        for name in base:
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{key}A.weight" in stored:
                changed[name] = base[name] + np.float32(scale) * (stored[f"{key}B.weight"] @ stored[f"{key}A.weight"])
        expected_model = model_from_transformers(write_model(tmp_path / adapter.name, tensors=changed))
        expected = ReferenceDecoder(expected_model.source, expected_model.decoder).step(TOKENS)
        merged = CausalModel(MergedSource(model.source, model.decoder, adapter), model.decoder, model.vocabulary, "")
        session = DecoderSession(engine_folder(merged, tmp_path / f"engine-{adapter.name}", form, []), model.decoder)
        found = session.step([TOKENS], [0], len(TOKENS))[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_adapter_on_a_quantised_file_whose_rows_are_interleaved(tmp_path: Path, form: Form) -> None:
    model = model_from_gguf(write_decoder(tmp_path / "source.gguf", Recipe(kind="Q4_1")))
    shapes = {
        f"model.layers.{layer}.self_attn.{part}": model.source.shape(f"blk.{layer}.attn_{part[0]}.weight")
        for layer in range(2)
        for part in ("q_proj", "k_proj", "v_proj")
    }
    adapter = read_adapter(files(tmp_path, "tune", {name: (shape[0], shape[1]) for name, shape in shapes.items()}, 4), model.source)
    session = DecoderSession(engine_folder(model, tmp_path / "engine", form, [adapter]), model.decoder)
    expected = ReferenceDecoder(MergedSource(model.source, model.decoder, adapter), model.decoder).step(TOKENS)
    found = session.step([TOKENS], [0], len(TOKENS), adapters=[1])[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_the_engine_serves_an_adapter_for_each_slot(tmp_path: Path) -> None:
    model = model_from_transformers(write_model(tmp_path / "source"))
    adapters = two_adapters(tmp_path, model)
    engine = open_generation_engine(
        engine_folder(model, tmp_path / "engine", OnnxRuntimeForm(), adapters), EngineOptions(threads=1, slots=3)
    )
    for number in range(3):
        engine.step([SlotTokens(number, TOKENS, number)])
    together = engine.step([SlotTokens(slot, [5], slot) for slot in (2, 0, 1)]).copy()
    for found, number in zip(together, (2, 0, 1), strict=True):
        source = MergedSource(model.source, model.decoder, adapters[number - 1]) if number else model.source
        expected = ReferenceDecoder(source, model.decoder).step([*TOKENS, 5], 1)[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(EngineError, match="no adapter 3"):
        engine.step([SlotTokens(0, [5], 3)])
    engine.close()


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "another method": ({"peft_type": "IA3"}, "'IA3'", "unsupported"),
    "dora": ({"use_dora": True}, "use_dora", "unsupported"),
    "bias": ({"bias": "all"}, "bias", "unsupported"),
    "ranks by pattern": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern", "unsupported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save", "unsupported"),
    "rank of nothing": ({"r": 0}, "r is 0", "bad_file"),
    "another rank": ({"r": 3}, "rank 3", "bad_file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_is_not_implemented_or_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    config, word, code = REFUSED[case]
    model = model_from_transformers(write_model(tmp_path / "source"))
    with pytest.raises(ConversionError, match=word) as refusal:
        read_adapter(files(tmp_path, "odd", shapes_of(weights(), ("q_proj",)), 2, **config), model.source)
    assert refusal.value.code == code


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.9.self_attn.q_proj"])
def test_an_adapter_to_what_cannot_be_changed_is_refused(tmp_path: Path, name: str) -> None:
    model = model_from_transformers(write_model(tmp_path / "source"))
    with pytest.raises(ConversionError, match="cannot be changed"):
        read_adapter(files(tmp_path, "odd", {name: (64, 64)}, 2), model.source)


def test_adapters_are_found_by_their_roles(tmp_path: Path) -> None:
    roles = ["model", "adapter.law.config", "adapter.law.weights", "merged.tone.weights", "merged.tone.config"]
    apart, merged = adapter_files({role: tmp_path / role for role in roles})
    assert apart == [AdapterFiles("law", tmp_path / "adapter.law.config", tmp_path / "adapter.law.weights")]
    assert [each.name for each in merged] == ["tone"]
    with pytest.raises(ConversionError, match="two files"):
        adapter_files({"adapter.law.config": tmp_path})
