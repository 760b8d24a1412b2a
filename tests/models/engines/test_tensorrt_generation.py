from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.engines import EngineError, EngineOptions, SlotTokens
from models.engines.device_cache import aligned_tokens
from models.engines.tensorrt_generation import PAST_STEP, TensorRtGenerationEngine, open_generation
from tests.models.engines.fake_cuda import FakeCuda
from tests.models.engines.fake_tensorrt import load_plan
from tests.models.engines.standard_decoder import write_standard_plan
from tests.models.engines.tiny_decoder import HEAD_DIM, KV_HEADS, LAYERS, VOCABULARY

TOKEN_BYTES = KV_HEADS * HEAD_DIM * 4
TOKENS = np.random.default_rng(1).integers(3, VOCABULARY, 200).tolist()


def opened(folder: Path, device: FakeCuda, slots: int = 4, context: int = 256, **options: Any) -> TensorRtGenerationEngine:
    return open_generation(folder, load_plan(folder), device, EngineOptions(slots=slots, context_tokens=context, **options))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_standard_plan(tmp_path_factory.mktemp("plan"), chunk=32)


def test_keys_and_values_never_come_to_the_host(plan: Path) -> None:
    device = FakeCuda()
    engine = opened(plan, device)
    engine.step([SlotTokens(0, TOKENS[:100]), SlotTokens(1, TOKENS[:3])])
    device.moved.update(up=0, down=0, rows=0)
    engine.step([SlotTokens(0, [5]), SlotTokens(1, [6])])
    assert device.moved["down"] == 2 * VOCABULARY * 4
    assert device.moved["up"] == 2 * (8 + 4 + 4)
    assert device.moved["rows"] == 2 * 2 * LAYERS * TOKEN_BYTES
    device.moved.update(up=0, down=0, rows=0)
    engine.copy(0, 2, 100)
    device.synchronize()
    assert device.moved == {"up": 0, "down": 0, "rows": 100 * 2 * LAYERS * TOKEN_BYTES}


def test_mapped_memory_is_not_copied_at_all(plan: Path) -> None:
    device = FakeCuda(is_mapped=True)
    engine = opened(plan, device)
    engine.step([SlotTokens(0, TOKENS[:10])])
    engine.step([SlotTokens(0, [5])])
    assert (device.moved["up"], device.moved["down"]) == (0, 0)


def test_pieces_of_a_prompt_are_written_straight_behind_where_addresses_are_aligned(plan: Path) -> None:
    device = FakeCuda()
    engine = opened(plan, device)
    engine.step([SlotTokens(0, TOKENS[:64])])
    assert device.moved["rows"] == 0
    engine.step([SlotTokens(0, TOKENS[:3])])
    engine.step([SlotTokens(0, TOKENS[:32])])  # 67 tokens of 128 bytes end between two multiples of 256
    assert device.moved["rows"] == 32 * 2 * LAYERS * TOKEN_BYTES


def test_repeated_steps_become_a_graph_until_the_past_or_the_rows_change(plan: Path) -> None:
    device = FakeCuda()
    engine = opened(plan, device)
    plain = opened(plan, FakeCuda(), cuda_graph=False)
    for each in (engine, plain):
        each.step([SlotTokens(0, TOKENS[: PAST_STEP - 6])])
    for index in range(12):
        found, expected = (each.step([SlotTokens(0, [TOKENS[index]])])[0].copy() for each in (engine, plain))
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=str(index))
    # One graph up to PAST_STEP tokens and one from there: the first step of each runs as it is.
    assert (device.captured, device.launched) == (2, 10)
    engine.step([SlotTokens(1, [7])])
    assert (device.captured, device.launched) == (2, 10)
    engine.step([SlotTokens(1, [7])])
    assert device.captured == 3


def test_an_engine_that_cannot_be_captured_runs_without_graphs(plan: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Uncapturable(FakeCuda):
        def capture(self, queue: Any) -> Any:
            raise EngineError("CUDA: cudaStreamEndCapture failed with error 901 (operation failed)")

    engine = opened(plan, Uncapturable())
    for _ in range(3):
        engine.step([SlotTokens(0, [5])])
    assert engine.length(0) == 3
    assert [record.message for record in caplog.records if "without a CUDA graph" in record.message and "901" in record.message]
    assert len(caplog.records) == 1


def test_half_precision_caches_take_the_type_of_the_engine(tmp_path: Path, plan: Path) -> None:
    half = opened(write_standard_plan(tmp_path, compute="float16"), FakeCuda())
    exact = opened(plan, FakeCuda())
    for batch in ([SlotTokens(0, TOKENS[:20]), SlotTokens(1, TOKENS[3:9])], [SlotTokens(0, [4]), SlotTokens(1, [5])]):
        found, expected = half.step(batch), exact.step(batch)
        assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_token_ids_take_the_type_of_the_engine(tmp_path: Path, plan: Path) -> None:
    narrow = opened(write_standard_plan(tmp_path, narrow=True), FakeCuda())
    assert narrow._inputs["input_ids"].dtype == "int32"
    np.testing.assert_array_equal(narrow.step([SlotTokens(0, TOKENS[:9])]), opened(plan, FakeCuda()).step([SlotTokens(0, TOKENS[:9])]))


def test_everything_is_given_back(plan: Path) -> None:
    device = FakeCuda()
    engine = opened(plan, device)
    for slot in range(4):
        engine.step([SlotTokens(slot, TOKENS[: 70 + slot])])
    engine.step([SlotTokens(slot, [5]) for slot in (0, 3)])  # swaps rows
    engine.close()
    engine.close()
    assert device.is_closed


def test_another_thread_is_refused(plan: Path) -> None:
    engine = opened(plan, FakeCuda())
    errors: list[str] = []

    def run() -> None:
        try:
            engine.step([SlotTokens(0, [5])])
        except EngineError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert len(errors) == 1
    assert "belongs to the thread that opened it" in errors[0]


def test_the_capacity_is_bounded_by_plan_model_and_request(tmp_path: Path, plan: Path) -> None:
    assert opened(plan, FakeCuda(), context=100_000).context_tokens == 256
    assert opened(plan, FakeCuda(), context=63).context_tokens == 63
    assert opened(write_standard_plan(tmp_path, capacity=51), FakeCuda(), context=256).context_tokens == 50  # of an even number of tokens
    with pytest.raises(EngineError, match="0 slots of 256 tokens"):
        opened(plan, FakeCuda(), slots=0)
    with pytest.raises(EngineError, match=r"MiB of KV cache \(400 slots of 256 tokens\).*288 MiB are free"):
        opened(plan, FakeCuda(free=288 << 20), slots=400)


def test_rows_start_aligned() -> None:
    assert aligned_tokens(63, 128, 256) == 64
    assert aligned_tokens(63, 256, 256) == 63
    assert aligned_tokens(255, 96, 255) == 248
    assert aligned_tokens(7, 96, 7) == 0


def test_a_plan_that_is_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_standard_plan(tmp_path)
    facts = json.loads((folder / "generation.json").read_text())
    for change, reason in (
        ({"layers": 3}, r"expected past.2.key \[\?, \?, 2, 16\]"),
        ({"head_dim": 8}, r"expected past.0.key \[\?, \?, 2, 8\]"),
        ({"layers": 1}, "expected no input past.1.key"),
        ({"vocabulary": 98}, r"expected output logits float32 \[\?, \?, 98\]"),
    ):
        (folder / "generation.json").write_text(json.dumps({**facts, **change}))
        with pytest.raises(EngineError, match=reason):
            opened(folder, FakeCuda())
