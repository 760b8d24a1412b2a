from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from converters.decoder_session import DecoderSession
from converters.errors import ConversionError
from converters.onnx_from_gguf import onnx_from_gguf
from converters.onnxruntime_operators import Activations
from converters.reference import ReferenceDecoder
from tests.converters.tiny_gguf import HEAD_DIM, VOCABULARY, RawTensor, Recipe, ones, write_decoder

TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, 48).tolist()


def silent(fraction: float, message: str) -> None:
    del fraction, message


def convert(folder: Path, recipe: Recipe, activations: Activations = "float32") -> tuple[DecoderSession, ReferenceDecoder]:
    gguf, decoder = onnx_from_gguf(write_decoder(folder / "source.gguf", recipe), folder, activations, silent)
    return DecoderSession(folder, decoder, rows=3), ReferenceDecoder(gguf, decoder)


RECIPES = [
    *(Recipe(kind=kind) for kind in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")),
    *(Recipe(architecture=name, kind=kind) for name in ("qwen2", "qwen3") for kind in ("Q4_1", "Q8_0")),
    Recipe(kind="Q4_K", value_kind="Q6_K", embedding_kind="Q6_K", head_kind="Q6_K"),
    Recipe(kind="Q4_0", embedding_kind="F16"),
    Recipe(kind="Q4_0", embedding_kind="Q4_1", head_kind="F16"),
    Recipe(metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
    Recipe(tensors={"rope_freqs.weight": RawTensor("F32", (HEAD_DIM // 2,), np.linspace(1, 8, HEAD_DIM // 2, dtype="<f4").tobytes())}),
]


@pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda recipe: f"{recipe.architecture}-{recipe.kind}-{recipe.embedding_kind}-{recipe.head_kind}"
)
def test_logits_equal_those_of_the_reference(tmp_path: Path, recipe: Recipe) -> None:
    session, reference = convert(tmp_path, recipe)
    expected = reference.step(TOKENS)
    found = session.step([TOKENS], [0], len(TOKENS))[0]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


def test_int8_activations_are_near_but_not_equal(tmp_path: Path) -> None:
    session, reference = convert(tmp_path, Recipe(kind="Q4_1", value_kind="Q8_0"), "int8")
    expected = reference.step(TOKENS)
    error = np.abs(session.step([TOKENS], [0], len(TOKENS))[0] - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.1


def test_a_prompt_in_chunks_and_single_steps_equal_the_whole(tmp_path: Path) -> None:
    session, _ = convert(tmp_path, Recipe())
    whole = session.step([TOKENS], [0], len(TOKENS))[0]
    pieces = [session.step([TOKENS[:20]], [0], 20)[0], session.step([TOKENS[20:44]], [20], 24)[0]]
    pieces += [session.step([[token]], [44 + index])[0] for index, token in enumerate(TOKENS[44:])]
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=0, atol=1e-4)


def test_only_the_last_positions_get_logits(tmp_path: Path) -> None:
    session, _ = convert(tmp_path, Recipe())
    whole = session.step([TOKENS], [0], len(TOKENS))
    for count in (0, 1, 5):
        last = session.step([TOKENS], [0], count)
        assert last.shape == (1, count, VOCABULARY)
        np.testing.assert_allclose(last, whole[:, len(TOKENS) - count :], rtol=0, atol=1e-4)


def test_rows_of_different_length_decode_together_as_alone(tmp_path: Path) -> None:
    session, reference = convert(tmp_path, Recipe())
    prompts = [TOKENS[:31], TOKENS[10:14], TOKENS[5:25]]
    for row, prompt in enumerate(prompts):
        session.step([prompt], [0], first_row=row)
    lengths = [len(prompt) for prompt in prompts]
    chosen = [[token] for token in (3, 4, 5)]
    for step in range(3):
        together = session.step(chosen, [length + step for length in lengths])
        for row, prompt in enumerate(prompts):
            reference.clear()
            alone = reference.step([*prompt, *([chosen[row][0]] * (step + 1))], 1)
            np.testing.assert_allclose(together[row], alone, rtol=0, atol=1e-4)


def test_the_folder_holds_what_an_engine_and_a_client_need(tmp_path: Path) -> None:
    convert(tmp_path, Recipe())
    facts = json.loads((tmp_path / "generation.json").read_text(encoding="utf-8"))
    assert facts["weights"] == {"Q8_0": 1, "Q4_1": 14}
    assert (facts["layers"], facts["heads"], facts["kv_heads"], facts["head_dim"]) == (2, 4, 2, 64)
    assert facts["eos_ids"] == [267, 269]
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8").startswith("{% for message")
    assert (tmp_path / "tokenizer.json").is_file()


def test_a_shorter_context_shortens_the_tables(tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "source.gguf", Recipe())
    _, decoder = onnx_from_gguf(source, tmp_path, "float32", silent, context_tokens=32)
    assert decoder.context_tokens == 32
    assert json.loads((tmp_path / "generation.json").read_text(encoding="utf-8"))["context_tokens"] == 32


REFUSED = {
    "architecture": (Recipe(architecture="mamba"), "'mamba'"),
    "experts": (Recipe(metadata={"llama.expert_count": 8}), "experts"),
    "yarn": (Recipe(metadata={"llama.rope.scaling.type": "yarn"}), "'yarn'"),
    "partial rotation": (Recipe(metadata={"llama.rope.dimension_count": 32}), "partial RoPE"),
    "sliding window": (Recipe(metadata={"llama.attention.sliding_window": 64}), "context_tokens=64"),
    "strange tensor": (Recipe(tensors={"blk.0.ffn_sub_norm.weight": ones(256)}), "ffn_sub_norm"),
    "head norms in llama": (Recipe(tensors={"blk.0.attn_q_norm.weight": ones(64)}), "attn_q_norm"),
    "tokenizer": (Recipe(metadata={"tokenizer.ggml.model": "rwkv"}), "'rwkv'"),
    "pre-tokenizer": (Recipe(metadata={"tokenizer.ggml.pre": "gpt-99"}), "'gpt-99'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, case: str) -> None:
    recipe, word = REFUSED[case]
    with pytest.raises(ConversionError, match=word) as refusal:
        onnx_from_gguf(write_decoder(tmp_path / "source.gguf", recipe), tmp_path, "float32", silent)
    assert refusal.value.code == "unsupported"


DAMAGED = {
    "missing tensor": Recipe(tensors={"blk.1.ffn_up.weight": None}),
    "shape against metadata": Recipe(metadata={"llama.feed_forward_length": 512}),
    "zero layers": Recipe(metadata={"llama.block_count": 0}),
    "more layers than tensors": Recipe(metadata={"llama.block_count": 900}),
    "too many tokens": Recipe(metadata={"tokenizer.ggml.tokens": [f"t{index}" for index in range(400)], "tokenizer.ggml.merges": []}),
    "merges of unknown tokens": Recipe(metadata={"tokenizer.ggml.merges": ["zz zz"]}),
    "merges without a space": Recipe(metadata={"tokenizer.ggml.merges": ["ab"]}),
    "token types of another length": Recipe(metadata={"tokenizer.ggml.token_type": np.ones(3, np.int32)}),
    "end of sequence outside": Recipe(metadata={"tokenizer.ggml.eos_token_id": 4000}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_model_is_named_so(tmp_path: Path, case: str) -> None:
    with pytest.raises(ConversionError) as refusal:
        onnx_from_gguf(write_decoder(tmp_path / "source.gguf", DAMAGED[case]), tmp_path, "float32", silent)
    assert refusal.value.code == "bad_file"
