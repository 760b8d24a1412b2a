from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.causal_model import CausalModel, model_from_transformers
from converters.decoder_graph import Form
from converters.decoder_session import DecoderSession
from converters.errors import ConversionError
from converters.onnx_from_causal_model import onnx_from_causal_model
from converters.onnxruntime_operators import OnnxRuntimeForm
from converters.quantised_source import QuantisedSource
from converters.reference import ReferenceDecoder
from converters.standard_operators import StandardForm
from tests.converters.tiny_transformers import VOCABULARY, files_of, weights, write_model, write_safetensors

TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, 24).tolist()
FORMS = [OnnxRuntimeForm(), StandardForm("float32")]


def silent(fraction: float, message: str) -> None:
    del fraction, message


def session_of(model: CausalModel, folder: Path, form: Form) -> DecoderSession:
    folder.mkdir(exist_ok=True)
    onnx_from_causal_model(model, folder, form, silent)
    return DecoderSession(folder, model.decoder)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits_equal_those_of_the_reference(tmp_path: Path, kind: str, form: Form) -> None:
    model = model_from_transformers(write_model(tmp_path / "source", kind))
    expected = ReferenceDecoder(model.source, model.decoder).step(TOKENS)
    found = session_of(model, tmp_path / "engine", form).step([TOKENS], [0], len(TOKENS))[0]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


def test_half_and_brain_weights_in_shards_are_the_same_model(tmp_path: Path) -> None:
    tensors = {name: values.astype(np.float16).astype(np.float32) for name, values in weights().items()}
    whole = model_from_transformers(write_model(tmp_path / "whole", tensors=tensors))
    folder = tmp_path / "shards"
    write_model(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-{1 + index % 2}.safetensors" for index, name in enumerate(names)}
    for shard in set(places.values()):
        write_safetensors(folder / shard, {name: tensors[name].astype(np.float16) for name in names if places[name] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    parts = model_from_transformers(files_of(folder))
    assert parts.source.format("blk.0.attn_q.weight") == "F16"
    expected, found = (ReferenceDecoder(model.source, model.decoder).step(TOKENS) for model in (whole, parts))
    assert np.array_equal(found, expected)


def test_tied_embeddings_and_marks(tmp_path: Path) -> None:
    model = model_from_transformers(write_model(tmp_path, changes={"tie_word_embeddings": True}), context_tokens=32)
    assert model.decoder.tied_head and "output.weight" not in model.source.tensors
    assert model.decoder.context_tokens == 32
    assert (model.vocabulary.bos_id, model.vocabulary.eos_id, model.vocabulary.eos_ids) == (257, 259, (256, 258, 259))
    assert model.chat_template == "{{ messages[0].content }}"
    assert model.vocabulary.tokenizer.decode(model.vocabulary.tokenizer.encode("Größe").ids) == "Größe"


def test_the_engine_folder_names_all_ends_of_an_answer(tmp_path: Path) -> None:
    model = model_from_transformers(write_model(tmp_path / "source"))
    session_of(model, tmp_path / "engine", OnnxRuntimeForm())
    facts = json.loads((tmp_path / "engine" / "generation.json").read_text(encoding="utf-8"))
    assert (facts["eos_id"], facts["eos_ids"], facts["bos_id"], facts["adapters"]) == (259, [256, 258, 259], 257, [])
    assert facts["weights"] == {"F32": 16}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", [OnnxRuntimeForm(), StandardForm("float32", (4, 8))], ids=str)
def test_weights_rounded_at_conversion(tmp_path: Path, bits: Any, form: Form) -> None:
    model = model_from_transformers(write_model(tmp_path / "source"))
    rounded = CausalModel(QuantisedSource(model.source, bits), model.decoder, model.vocabulary, "")
    found = session_of(rounded, tmp_path / "engine", form).step([TOKENS], [0], len(TOKENS))[0]
    exact = ReferenceDecoder(rounded.source, model.decoder).step(TOKENS)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    assert {rounded.source.format(name) for name in rounded.source.tensors} == {"F32", "Q8_0", "Q4_1" if bits == 4 else "Q8_0"}


@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_is_further_off_than_half_a_step(tmp_path: Path, bits: Any) -> None:
    model = model_from_transformers(write_model(tmp_path))
    name = "blk.0.ffn_down.weight"
    plain = model.source.float32(name).reshape(64, -1, 32)
    error = np.abs(QuantisedSource(model.source, bits).float32(name).reshape(plain.shape) - plain)
    step = np.abs(plain).max(axis=-1) / 127 if bits == 8 else np.ptp(plain, axis=-1) / 15
    assert (error <= 0.5001 * step[..., None]).all()
    assert error.max() > 0.4 * step.min()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma": ({"model_type": "gemma2"}, "'gemma2'"),
    "phi": ({"model_type": "phi3"}, "'phi3'"),
    "activation": ({"hidden_act": "gelu"}, "'gelu'"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantised already"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial RoPE"),
    "sliding window": ({"model_type": "mistral", "sliding_window": 64}, "context_tokens=64"),
    "head": ({"head_dim": 24}, "multiple of 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, word = REFUSED[case]
    with pytest.raises(ConversionError, match=word) as refusal:
        model_from_transformers(write_model(tmp_path, changes=changes))
    assert refusal.value.code == "unsupported"


def test_a_bias_without_a_place_is_refused(tmp_path: Path) -> None:
    tensors = weights() | {"model.layers.0.self_attn.o_proj.bias": np.zeros(64, np.float32)}
    with pytest.raises(ConversionError, match=r"attn_output\.bias") as refusal:
        model_from_transformers(write_model(tmp_path, tensors=tensors))
    assert refusal.value.code == "unsupported"


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "text for a number": ({"num_hidden_layers": "2"}, "num_hidden_layers"),
    "no type": ({"model_type": ...}, "model_type"),
    "another width": ({"intermediate_size": 128}, "shape"),
    "more layers": ({"num_hidden_layers": 3}, "no tensor"),
    "negative base": ({"rope_theta": -1.0}, "rope_theta"),
    "end outside": ({"eos_token_id": 4000}, "eos_token_id"),
    "stretched backwards": ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_model_is_named_so(tmp_path: Path, case: str) -> None:
    changes, word = DAMAGED[case]
    with pytest.raises(ConversionError, match=word) as refusal:
        model_from_transformers(write_model(tmp_path, changes=changes))
    assert refusal.value.code == "bad_file"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    files = write_model(tmp_path)
    del files[name]
    with pytest.raises(ConversionError, match=name.replace(".", r"\.")):
        model_from_transformers(files)
