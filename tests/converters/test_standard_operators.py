"""The standard form against the numpy reference: ONNX Runtime runs the graph, the cache contract is kept by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from converters.decoder_from_gguf import decoder_from_gguf
from converters.decoder_graph import write_decoder_graph
from converters.decoder_session import Cache, DecoderSession
from converters.gguf import read_gguf
from converters.reference import ReferenceDecoder
from converters.standard_operators import StandardForm
from tests.converters.tiny_gguf import HEAD_DIM, VOCABULARY, RawTensor, Recipe, write_decoder

TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, 48).tolist()
FLOAT32 = StandardForm("float32")


def convert(folder: Path, recipe: Recipe, form: StandardForm = FLOAT32) -> tuple[DecoderSession, ReferenceDecoder]:
    gguf = read_gguf(write_decoder(folder / "source.gguf", recipe))
    decoder = decoder_from_gguf(gguf)
    write_decoder_graph(gguf, decoder, folder, form, lambda fraction, message: None)
    return DecoderSession(folder, decoder, rows=3), ReferenceDecoder(gguf, decoder)


RECIPES = [
    *(Recipe(kind=kind) for kind in ("F16", "Q4_1", "Q6_K")),
    *(Recipe(architecture=name, kind="Q4_1") for name in ("qwen2", "qwen3")),
    Recipe(kind="Q4_0", embedding_kind="Q4_1", head_kind="F16"),
    Recipe(tensors={"rope_freqs.weight": RawTensor("F32", (HEAD_DIM // 2,), np.linspace(1, 8, HEAD_DIM // 2, dtype="<f4").tobytes())}),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.architecture}-{recipe.kind}-{recipe.head_kind}")
@pytest.mark.parametrize("form", [FLOAT32, StandardForm("float32", (4,)), StandardForm("float32", (4, 8))], ids=str)
def test_logits_equal_those_of_the_reference(tmp_path: Path, recipe: Recipe, form: StandardForm) -> None:
    session, reference = convert(tmp_path, recipe, form)
    expected = reference.step(TOKENS)
    found = session.step([TOKENS], [0], len(TOKENS))[0]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


@pytest.mark.parametrize("form", [StandardForm("float16"), StandardForm("float16", (4, 8))], ids=str)
def test_half_precision_is_near_but_not_equal(tmp_path: Path, form: StandardForm) -> None:
    session, reference = convert(tmp_path, Recipe(kind="Q4_1", value_kind="Q8_0"), form)
    expected = reference.step(TOKENS)
    error = np.abs(session.step([TOKENS], [0], len(TOKENS))[0] - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 5e-3
    assert session.cache["0.key"].dtype == np.float16


def test_the_graph_is_of_standard_operators_in_an_old_opset(tmp_path: Path) -> None:
    for form, opset in ((FLOAT32, 17), (StandardForm("float16"), 17), (StandardForm("float16", (4,)), 21)):
        convert(tmp_path, Recipe(), form)
        onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
        model = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
        assert [(found.domain, found.version) for found in model.opset_import] == [("", opset)]
        assert {node.domain for node in model.graph.node} == {""}


def test_what_is_masked_and_where_the_past_ends_does_not_matter(tmp_path: Path) -> None:
    session, _ = convert(tmp_path, Recipe())
    whole = session.step([TOKENS], [0], len(TOKENS))[0]
    for cache in session.cache.values():
        cache[:] = 1e4
    pieces = [session.step([TOKENS[:20]], [0], 20, past=96)[0], session.step([TOKENS[20:44]], [20], 24, past=77)[0]]
    pieces += [session.step([[token]], [44 + index], past=96)[0] for index, token in enumerate(TOKENS[44:])]
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=0, atol=1e-4)


def test_rows_of_different_length_advance_together_as_alone(tmp_path: Path) -> None:
    session, reference = convert(tmp_path, Recipe())
    prompts = [TOKENS[:31], TOKENS[10:14], []]
    for row, prompt in enumerate(prompts):
        if prompt:
            session.step([prompt], [0], first_row=row)
    lengths = [len(prompt) for prompt in prompts]
    added: list[list[int]] = [[], [], []]
    for count in (1, 3, 1, 1):
        chosen = [TOKENS[row : row + count] for row in range(3)]
        together = session.step(chosen, [length + len(added[0]) for length in lengths], count)
        for row, prompt in enumerate(prompts):
            added[row] += chosen[row]
            reference.clear()
            alone = reference.step([*prompt, *added[row]], count)
            np.testing.assert_allclose(together[row], alone, rtol=0, atol=1e-4)


def test_a_row_may_be_filled_up(tmp_path: Path) -> None:
    """A short row beside a long one, and one that is filled up past the end of the context."""
    session, reference = convert(tmp_path, Recipe(metadata={"llama.context_length": 96}))
    session.step([TOKENS, TOKENS], [0, 0])
    session.step([TOKENS[:46]], [48], first_row=1)
    rows = np.array([TOKENS[:8], [TOKENS[5], *[0] * 7]], np.int64)
    inputs: Cache = {"input_ids": rows, "lengths": np.array([48, 94], np.int32), "logits_at": np.array([[0, 7], [0, 0]], np.int32)}
    inputs |= {f"past.{name}": whole[:2] for name, whole in session.cache.items()}
    found = session.run(["logits"], inputs)[0]
    reference.step(TOKENS)
    np.testing.assert_allclose(found[0], reference.step(TOKENS[:8])[[0, 7]], rtol=0, atol=1e-4)
    reference.clear()
    reference.step([*TOKENS, *TOKENS[:46]])
    np.testing.assert_allclose(found[1, 0], reference.step(TOKENS[5:6])[0], rtol=0, atol=1e-4)
