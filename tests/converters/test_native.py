"""The native engine against the numpy reference: each weight format, architecture and instruction set, and any cut of the work."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from converters.build import build
from converters.causal_model import model_from_gguf
from converters.errors import ConversionError
from converters.native_from_causal_model import compile_library, find_compiler, native_from_causal_model
from converters.onnxruntime_operators import Activations
from converters.reference import ReferenceDecoder
from converters.request import BuildOptions, BuildRequest
from models.engines import EngineError, EngineOptions, SlotTokens, open_generation_engine
from models.engines.native import NativeGenerationEngine
from models.engines.native.weights import cpu_identity
from models.manifest import manifest_from_mapping
from tests.converters import manifests
from tests.converters.tiny_gguf import VOCABULARY, Recipe, write_decoder

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C compiler: the native engine is not built here"),
    pytest.mark.usefixtures("caching_compiler"),
]

TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, 300).tolist()
# Their weights become eight-bit blocks of 32 columns.
ROUNDED = ("Q6_K", "F16")
INSTRUCTIONS = {
    "widest": (),
    "avx2": ("-march=haswell",),
}


def opened(folder: Path, slots: int = 3, context: int = 512, threads: int = 2) -> NativeGenerationEngine:
    engine = open_generation_engine(folder, EngineOptions(slots=slots, context_tokens=context, threads=threads))
    return cast("NativeGenerationEngine", engine)


def convert(folder: Path, recipe: Recipe, activations: Activations = "float32") -> ReferenceDecoder:
    folder.mkdir()
    recipe = replace(recipe, metadata={f"{recipe.architecture}.context_length": 2048})
    model = model_from_gguf(write_decoder(folder.parent / f"{folder.name}.gguf", recipe))
    native_from_causal_model(model, folder, lambda fraction, message: None, activations)
    return ReferenceDecoder(model.source, model.decoder)


def mean_kl(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        normed: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return normed

    source, result = log_softmax(expected), log_softmax(found)
    return float((np.exp(source) * (source - result)).sum(axis=1).mean())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16"])
def test_each_weight_format_gives_the_logits_of_the_reference(kind: str, tmp_path: Path) -> None:
    reference = convert(tmp_path / kind, Recipe(kind=kind, embedding_kind="Q8_0" if kind == "F16" else kind))
    engine = opened(tmp_path / kind)
    assert mean_kl(reference.step(TOKENS[:40]), engine.all_logits(SlotTokens(0, TOKENS[:40]))) < (1e-3 if kind in ROUNDED else 1e-5)
    engine.close()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_each_architecture_gives_the_logits_of_the_reference(architecture: str, tmp_path: Path) -> None:
    reference = convert(tmp_path / "engine", Recipe(architecture=architecture))
    engine = opened(tmp_path / "engine")
    assert mean_kl(reference.step(TOKENS), engine.all_logits(SlotTokens(2, TOKENS))) < 1e-5
    engine.close()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(("kind", "activations", "most"), [("Q4_1", "float32", 1e-5), ("Q8_0", "float32", 1e-5), ("Q8_0", "int8", 2e-3)])
def test_each_instruction_set_gives_the_logits_of_the_reference(
    instructions: str, kind: str, activations: Activations, most: float, tmp_path: Path
) -> None:
    reference = convert(tmp_path / "engine", Recipe(kind=kind), activations)
    compile_library(tmp_path / "engine", INSTRUCTIONS[instructions])
    engine = opened(tmp_path / "engine")
    assert mean_kl(reference.step(TOKENS[:60]), engine.all_logits(SlotTokens(0, TOKENS[:60]))) < most
    engine.close()


def test_a_long_text_gives_the_logits_of_the_reference_however_it_is_cut(tmp_path: Path) -> None:
    """Attention goes over chunks of 256 positions: here are five."""
    reference = convert(tmp_path / "engine", Recipe())
    long = np.random.default_rng(6).integers(0, VOCABULARY, 1100).tolist()
    engine = opened(tmp_path / "engine", context=2048)
    whole = engine.all_logits(SlotTokens(0, long))
    assert mean_kl(reference.step(long), whole) < 1e-5
    single = np.concatenate([engine.step([SlotTokens(1, [token])]).copy() for token in long])
    np.testing.assert_array_equal(single, whole)
    for width in (2, 3, 5, 24):
        engine.truncate(0, 490)
        for at in range(490, 790, width):
            found = engine.step([SlotTokens(0, long[at : at + width], logits=width)])
            np.testing.assert_array_equal(found, whole[at : at + width])
    engine.close()


def test_no_cut_of_a_prompt_and_no_neighbour_changes_a_bit(tmp_path: Path) -> None:
    convert(tmp_path / "engine", Recipe())
    engine = opened(tmp_path / "engine")
    whole = engine.all_logits(SlotTokens(0, TOKENS))
    single = np.concatenate([engine.step([SlotTokens(1, [token])]).copy() for token in TOKENS])
    np.testing.assert_array_equal(single, whole)
    engine.truncate(1, 0)
    random = np.random.default_rng(2)
    engine.truncate(0, 0)
    at = 0
    while at < len(TOKENS):
        piece = TOKENS[at : at + int(random.integers(1, 70))]
        at += len(piece)
        if engine.length(1) > 400:
            engine.truncate(1, 0)
        neighbour = SlotTokens(1, random.integers(0, VOCABULARY, int(random.integers(1, 40))).tolist())
        logits = engine.step([neighbour, SlotTokens(0, piece)])
        np.testing.assert_array_equal(logits[1], whole[at - 1])
    engine.copy(0, 2, 123)
    np.testing.assert_array_equal(engine.step([SlotTokens(2, TOKENS[123:])])[0], whole[-1])
    engine.truncate(2, 77)
    np.testing.assert_array_equal(engine.step([SlotTokens(2, TOKENS[77:90])])[0], whole[89])
    engine.close()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize(("kind", "activations"), [("Q4_1", "float32"), ("Q4_0", "int8"), ("Q8_0", "float32"), ("Q8_0", "int8")])
def test_tiles_change_no_bit(kind: str, activations: Activations, tmp_path: Path) -> None:
    """Where the CPU has AMX, prompts are computed 16 tokens at once; elsewhere both are the same code."""
    convert(tmp_path / "with", Recipe(kind=kind), activations)
    shutil.copytree(tmp_path / "with", tmp_path / "without")
    compile_library(tmp_path / "without", ("-march=native", "-mno-amx-int8"))
    answers = []
    for name in ("with", "without"):
        engine = opened(tmp_path / name)
        answers.append(engine.all_logits(SlotTokens(0, TOKENS)))
        engine.close()
    np.testing.assert_array_equal(answers[0], answers[1])


def test_guesses_are_verified_to_the_bit_beside_others_and_over_the_limit_of_a_step(tmp_path: Path) -> None:
    convert(tmp_path / "engine", Recipe())
    engine = opened(tmp_path / "engine", context=1024)
    single = np.concatenate([engine.step([SlotTokens(0, [token])]).copy() for token in TOKENS])
    engine.truncate(0, 100)
    batch = [SlotTokens(1, TOKENS[:70]), SlotTokens(0, TOKENS[100:140], logits=40), SlotTokens(2, TOKENS[:9], logits=2)]
    logits = engine.step(batch)
    np.testing.assert_array_equal(logits, np.concatenate([single[69:70], single[100:140], single[7:9]]))
    for slot in range(3):
        engine.truncate(slot, 0)
    logits = engine.step([SlotTokens(0, TOKENS, logits=1), SlotTokens(1, TOKENS * 2, logits=300), SlotTokens(2, TOKENS, logits=300)])
    np.testing.assert_array_equal(np.concatenate([logits[:1], logits[301:]]), np.concatenate([single[-1:], single]))
    np.testing.assert_array_equal(logits[1:301], engine.all_logits(SlotTokens(2, TOKENS)))
    engine.close()


def test_the_number_of_threads_changes_nothing(tmp_path: Path) -> None:
    convert(tmp_path / "engine", Recipe())
    answers = []
    for threads in (1, 2, 7):
        engine = opened(tmp_path / "engine", threads=threads)
        answers.append(engine.all_logits(SlotTokens(0, TOKENS)))
        engine.close()
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])


def test_more_than_a_step_takes_goes_in_pieces(tmp_path: Path) -> None:
    convert(tmp_path / "engine", Recipe())
    engine = opened(tmp_path / "engine", slots=2, context=1024)
    long = TOKENS * 3
    together = engine.step([SlotTokens(0, long), SlotTokens(1, TOKENS[:9])]).copy()
    engine.truncate(0, 0)
    engine.truncate(1, 0)
    np.testing.assert_array_equal(together[0], engine.all_logits(SlotTokens(0, long))[-1])
    np.testing.assert_array_equal(together[1], engine.step([SlotTokens(1, TOKENS[:9])])[0])
    engine.close()


def test_what_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    convert(tmp_path / "engine", Recipe())
    engine = opened(tmp_path / "engine", slots=1, context=16)
    with pytest.raises(EngineError, match="exceed its capacity of 16"):
        engine.step([SlotTokens(0, TOKENS[:17])])
    with pytest.raises(EngineError, match="no adapter 1"):
        engine.step([SlotTokens(0, TOKENS[:1], 1)])
    engine.close()
    with pytest.raises(EngineError, match="was closed"):
        engine.step([SlotTokens(0, TOKENS[:1])])
    with pytest.raises(EngineError, match="MiB of KV cache"):
        open_generation_engine(tmp_path / "engine", EngineOptions(slots=100_000_000, context_tokens=256))


@pytest.mark.parametrize("damage", ["short", "magic", "cpu", "library"])
def test_a_damaged_or_foreign_engine_is_refused(damage: str, tmp_path: Path) -> None:
    convert(tmp_path / "engine", Recipe())
    path = tmp_path / "engine" / "model.native"
    text = path.read_bytes()
    path.unlink()
    damaged = {
        "short": (text[:-100], "does not lie whole"),
        "magic": (b"NOTHING!" + text[8:], "is no model.native"),
        "cpu": (text.replace(b'"cpu":"', b'"cpu":"X', 1).replace(b" ", b"", 1), "convert the model on this device"),
        "library": (text, "cannot be loaded"),
    }
    path.write_bytes(damaged[damage][0])
    if damage == "library":
        library = tmp_path / "engine" / "decoder.so"
        library.unlink()
        library.write_bytes(b"\x7fELF nonsense")
    with pytest.raises(EngineError, match=damaged[damage][1]):
        opened(tmp_path / "engine")


def test_a_build_for_it_is_proven_published_and_reused(tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "tiny.gguf", Recipe())
    manifest = manifest_from_mapping(manifests.generation())
    request = BuildRequest(manifest, {"model": source}, tmp_path / "store", BuildOptions(target="native"))
    built = build(request, lambda phase, fraction, message: None)
    record = built.engine.record
    assert (record.key.runtime, record.key.device, record.key.precision) == ("native", cpu_identity(), "fp32")
    assert record.verdict["passed"] is True
    assert 0 < record.verdict["figures"]["mean_kl"] < 1e-5
    assert {"model.native", "decoder.so", "tokenizer.json", "generation.json"} <= set(record.files)
    assert build(request, lambda phase, fraction, message: None).is_reused
    rough = BuildRequest(manifest, {"model": source}, tmp_path / "store", BuildOptions(target="native", precision="int8"))
    figures = build(rough, lambda phase, fraction, message: None).engine.record.verdict["figures"]
    assert record.verdict["figures"]["mean_kl"] < figures["mean_kl"] < 0.01


@pytest.mark.parametrize("kind", ["F16", "Q6_K"])
def test_weights_that_would_be_rounded_are_never_called_fp32(kind: str, tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "tiny.gguf", Recipe(kind=kind, value_kind=kind))

    def built(mean_kl: float, **options: Any) -> Mapping[str, Any]:
        manifest = manifest_from_mapping(manifests.generation(mean_kl=mean_kl))
        request = BuildRequest(manifest, {"model": source}, tmp_path / "store", BuildOptions(target="native", **options))
        return build(request, lambda phase, fraction, message: None).engine.record.verdict

    (attempt,) = built(0.01)["attempts"]
    assert (attempt["precision"], attempt["notes"]["rounded"]) == ("int8 with activations in fp32", [kind])
    # What this engine cannot do exactly is left to ONNX Runtime, asked for or at the end of the ladder.
    with pytest.raises(ConversionError, match=rf"weights of {kind}.*take onnxruntime") as refusal:
        built(0.01, precision="fp32")
    assert refusal.value.code == "unsupported"
    with pytest.raises(ConversionError, match=r"mean_kl is .*; fp32: .* take onnxruntime") as refusal:
        built(0.0)
    assert refusal.value.code == "unsupported"


def test_without_a_compiler_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ConversionError, match="install gcc"):
        compile_library(tmp_path)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    false = shutil.which("false")
    assert false is not None
    monkeypatch.setenv("CC", false)
    with pytest.raises(ConversionError, match="could not compile"):
        compile_library(tmp_path)
