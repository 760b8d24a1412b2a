"""Decoders as plans: both profiles, keys and values as inputs and outputs, in every form, by the real parser and builder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from converters.causal_model import model_from_gguf, model_from_transformers
from converters.decoder_graph import write_decoder_graph
from converters.decoder_profiles import decoder_profiles
from converters.lora import Adapter, LowRank
from converters.standard_operators import StandardForm
from tests.converters.tensorrt.process import build, request
from tests.converters.tiny_gguf import Recipe, write_decoder
from tests.converters.tiny_transformers import write_model

pytest.importorskip("tensorrt_rtx")


def silent(fraction: float, message: str) -> None:
    del fraction, message


@pytest.mark.parametrize(
    ("form", "precision"),
    [
        (StandardForm("float32"), "fp32"),
        (StandardForm("float32"), "tf32"),
        (StandardForm("float16"), "typed"),
        (StandardForm("float16", (4,)), "typed"),
        (StandardForm("float16", (4, 8)), "typed"),
    ],
    ids=str,
)
def test_a_decoder_from_gguf_becomes_a_plan(tmp_path: Path, form: StandardForm, precision: str) -> None:
    model = model_from_gguf(write_decoder(tmp_path / "source.gguf", Recipe(kind="Q4_1", value_kind="Q8_0")))
    source, plan = write_decoder_graph(model.source, model.decoder, tmp_path, form, silent), tmp_path / "model.plan"
    result = build(request(source, plan, profiles=decoder_profiles(model.decoder, 4, 128, 32), precision=precision)).result
    assert result["size_bytes"] == plan.stat().st_size > 0


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_decoder_with_adapters_becomes_a_plan(tmp_path: Path, kind: str) -> None:
    model = model_from_transformers(write_model(tmp_path / "source", kind))
    adapter = Adapter("law", {"blk.0.attn_q.weight": LowRank(np.ones((2, 64), np.float32), np.ones((64, 2), np.float32))})
    source = write_decoder_graph(model.source, model.decoder, tmp_path, StandardForm("float16"), silent, [adapter])
    profiles = decoder_profiles(model.decoder, 2, 64, 16, has_adapters=True)
    result = build(request(source, tmp_path / "model.plan", profiles=profiles, precision="typed")).result
    assert result["size_bytes"] > 0


def test_the_profiles_name_every_input_and_bound_every_axis(tmp_path: Path) -> None:
    model = model_from_gguf(write_decoder(tmp_path / "source.gguf", Recipe()))
    source = write_decoder_graph(model.source, model.decoder, tmp_path, StandardForm("float16"), silent)
    inputs = {value.name: len(value.type.tensor_type.shape.dim) for value in onnx.load(str(source), load_external_data=False).graph.input}
    steps, pieces = decoder_profiles(model.decoder, slots=3, capacity=4096, chunk=512)
    for profile in (steps, pieces):
        assert {name: {len(sizes) for sizes in ranges} for name, ranges in profile.items()} == {
            name: {rank} for name, rank in inputs.items()
        }
        assert all(least <= usual <= most for ranges in profile.values() for least, usual, most in zip(*ranges))
    # The context of the model bounds what is asked for.
    assert steps["input_ids"] == [[1, 1], [3, 1], [3, 1]] and steps["past.1.value"][2] == [3, 128, 2, 64]
    assert pieces["input_ids"] == [[1, 1], [1, 128], [1, 128]] and pieces["logits_at"] == [[1, 1]] * 3
