"""What every generation engine keeps: the fake, ONNX Runtime, native code, TensorRT's over a fake device; on decoders of two layers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Callable

import numpy as np
import pytest

from models.engines import EngineError, EngineOptions, GenerationEngine, SlotTokens, open_generation_engine
from models.engines.fake import FakeGenerationEngine
from models.engines.tensorrt_generation import open_generation
from tests.models.engines.fake_cuda import FakeCuda
from tests.models.engines.fake_tensorrt import load_plan
from tests.models.engines.tiny_decoder import VOCABULARY, write_tiny_decoder

Open = Callable[[int, int], GenerationEngine]


# Of TensorRT: discrete GPU with CUDA graphs, integrated GPU, a package without graphs, a plan for one row at a time.
DEVICES: dict[str, dict[str, bool]] = {
    "tensorrt": {},
    "tensorrt mapped": {"is_mapped": True},
    "tensorrt without graphs": {"can_capture": False},
    "tensorrt row by row": {},
}


@pytest.fixture(params=["fake", "onnx", "native", *DEVICES])
def open_with(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens an engine with (slots, context_tokens)."""
    if request.param == "fake":
        return lambda slots, context: FakeGenerationEngine(VOCABULARY, slots, context)
    if request.param in DEVICES:
        if sys.version_info < (3, 10):
            pytest.skip("plans are written by Python 3.10 or later")
        from tests.models.engines.standard_decoder import write_standard_plan

        rows = 1 if "row by row" in request.param else 4
        plan_folder = write_standard_plan(tmp_path / "plan", slots=rows, chunk=16)

        def open_plan(slots: int, context: int) -> GenerationEngine:
            options = EngineOptions(slots=slots, context_tokens=context)
            return open_generation(plan_folder, load_plan(plan_folder), FakeCuda(**DEVICES[request.param]), options)

        return open_plan
    native: bool = request.param == "native"
    folder = request.getfixturevalue("tiny_native") if native else write_tiny_decoder(tmp_path / "tiny")
    return lambda slots, context: open_generation_engine(folder, EngineOptions(slots=slots, context_tokens=context, threads=1))


def prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(3, VOCABULARY, int(length)).tolist() for length in random.integers(1, 30, count)]


def alone(engine: GenerationEngine, slot: int, prompt: list[int], count: int) -> list[int]:
    engine.truncate(slot, 0)
    tokens: list[int] = []
    logits = engine.step([SlotTokens(slot, prompt)])
    for _ in range(count):
        tokens.append(int(logits[0].argmax()))
        logits = engine.step([SlotTokens(slot, tokens[-1:])])
    engine.truncate(slot, 0)
    return tokens


def test_reports_its_shape_and_lengths(open_with: Open) -> None:
    engine = open_with(3, 64)
    assert (engine.slots, engine.context_tokens, engine.vocabulary) == (3, 64, engine.vocabulary)
    logits = engine.step([SlotTokens(1, [5, 6, 7]), SlotTokens(2, [8])])
    assert logits.shape == (2, engine.vocabulary)
    assert logits.dtype == np.float32
    assert [engine.length(slot) for slot in range(3)] == [0, 3, 1]


def test_sequences_joined_at_different_steps_generate_as_alone(open_with: Open) -> None:
    engine = open_with(4, 64)
    asked = prompts(8)
    expected = [alone(engine, 0, prompt, 12) for prompt in asked]
    got: dict[int, list[int]] = {}
    slot_of: dict[int, int] = {}
    waiting = list(range(8))
    random = np.random.default_rng(11)
    while waiting or slot_of:
        batch = [(number, SlotTokens(slot, got[number][-1:])) for number, slot in slot_of.items()]
        free = [slot for slot in range(4) if slot not in slot_of.values()]
        if waiting and free and (random.random() < 0.5 or not batch):
            number = waiting.pop(0)
            slot_of[number] = int(random.choice(free))
            got[number] = []
            batch.append((number, SlotTokens(slot_of[number], asked[number])))
        order = random.permutation(len(batch))
        logits = engine.step([batch[index][1] for index in order])
        for row, index in zip(logits, order):
            got[batch[index][0]].append(int(row.argmax()))
        for number in [number for number in slot_of if len(got[number]) == 12]:
            engine.truncate(slot_of.pop(number), 0)
    assert [got[number] for number in range(8)] == expected


def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(open_with: Open) -> None:
    engine = open_with(2, 64)
    prompt = np.random.default_rng(4).integers(3, VOCABULARY, 40).tolist()
    whole = engine.step([SlotTokens(0, prompt)])[0].copy()
    for start in (0, 16, 32):
        chunked = engine.step([SlotTokens(1, prompt[start : start + 16])])[0]
    np.testing.assert_allclose(chunked, whole, atol=1e-5)


def test_truncate_forgets_and_copy_shares_a_prefix(open_with: Open) -> None:
    engine = open_with(3, 64)
    prompt = np.random.default_rng(5).integers(3, VOCABULARY, 20).tolist()
    whole = engine.step([SlotTokens(0, prompt)])[0].copy()
    engine.step([SlotTokens(0, [9, 9, 9]), SlotTokens(2, [4, 5])])
    engine.copy(0, 2, 15)
    engine.truncate(0, 10)
    assert [engine.length(0), engine.length(2)] == [10, 15]
    again = engine.step([SlotTokens(2, prompt[15:]), SlotTokens(0, prompt[10:])])
    np.testing.assert_allclose(again[0], whole, atol=1e-5)
    np.testing.assert_allclose(again[1], whole, atol=1e-5)


def test_rows_moved_to_run_together_keep_their_sequences(open_with: Open) -> None:
    engine = open_with(4, 64)
    asked = [np.random.default_rng(seed).integers(3, VOCABULARY, 6 + seed).tolist() for seed in range(4)]
    for slot, prompt in enumerate(asked):
        engine.step([SlotTokens(slot, prompt)])
    for pair in ((0, 3), (1, 3), (3, 1), (0, 2)):
        engine.step([SlotTokens(slot, [10 + slot]) for slot in pair])
        for slot in pair:
            asked[slot] = [*asked[slot], 10 + slot]
    together = engine.step([SlotTokens(slot, [50]) for slot in (2, 0, 3)]).copy()
    fresh = open_with(4, 64)
    for row, slot in zip(together, (2, 0, 3)):
        np.testing.assert_allclose(row, fresh.step([SlotTokens(slot, [*asked[slot], 50])])[0], atol=1e-4)


def test_verification_gives_the_logits_of_one_by_one_or_is_refused(open_with: Open) -> None:
    engine = open_with(3, 64)
    prompt = np.random.default_rng(6).integers(3, VOCABULARY, 20).tolist()
    batch = [SlotTokens(1, prompt[:7]), SlotTokens(0, prompt[12:], logits=6), SlotTokens(2, [5])]
    engine.step([SlotTokens(0, prompt[:12])])
    if not engine.can_verify:
        with pytest.raises(EngineError, match="6 of 8 tokens are not to be had"):
            engine.step(batch)
        return
    logits = engine.step(batch).copy()
    assert logits.shape == (8, engine.vocabulary)
    engine.truncate(0, 15)
    single = np.concatenate([engine.step([SlotTokens(0, [token])]).copy() for token in prompt[15:]])
    np.testing.assert_array_equal(logits[2:7], single)
    with pytest.raises(EngineError, match="are not to be had"):
        engine.step([SlotTokens(0, [1, 2], logits=3)])


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ([], "at least one slot"),
        ([SlotTokens(0, [1]), SlotTokens(0, [2])], "twice"),
        ([SlotTokens(7, [1])], "slot 7 does not exist"),
        ([SlotTokens(0, [])], "at least one token"),
        ([SlotTokens(0, [1 << 20])], "outside the vocabulary"),
        ([SlotTokens(1, [5]), SlotTokens(0, [1] * 15)], "exceed its capacity of 16"),
    ],
)
def test_a_wrong_step_is_refused_and_changes_nothing(open_with: Open, batch: list[SlotTokens], reason: str) -> None:
    engine = open_with(2, 16)
    engine.step([SlotTokens(0, [3, 4])])
    with pytest.raises(EngineError, match=reason):
        engine.step(batch)
    assert [engine.length(0), engine.length(1)] == [2, 0]


def test_wrong_slots_and_lengths_are_refused(open_with: Open) -> None:
    engine = open_with(2, 16)
    engine.step([SlotTokens(0, [3, 4])])
    for wrong in (lambda: engine.truncate(0, 3), lambda: engine.copy(0, 1, 3), lambda: engine.length(2), lambda: engine.truncate(-1, 0)):
        with pytest.raises(EngineError):
            wrong()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.step([SlotTokens(0, [1])])
