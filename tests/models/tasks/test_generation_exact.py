"""Who joins in the middle gets, token by token, what he gets alone, and a prefix that was kept changes nothing: on the real engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.engines import EngineOptions, GenerationEngine, open_generation_engine
from models.tasks.generation.sampling import Sampling
from models.tasks.generation.scheduler import Scheduler, SchedulerSettings
from models.tasks.generation.sequence import GenerationRequest
from tests.models.engines.tiny_decoder import write_tiny_decoder

SLOTS, CONTEXT = 3, 128


@pytest.fixture(scope="module", params=["onnx", "native"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GenerationEngine:
    is_native: bool = request.param == "native"
    folder: Path = request.getfixturevalue("tiny_native") if is_native else write_tiny_decoder(tmp_path_factory.mktemp("onnx"))
    return open_generation_engine(folder, EngineOptions(slots=SLOTS, context_tokens=CONTEXT, threads=2))


def emptied(engine: GenerationEngine) -> GenerationEngine:
    for slot in range(engine.slots):
        engine.truncate(slot, 0)
    return engine


def alone(engine: GenerationEngine, request: GenerationRequest) -> tuple[int, ...]:
    """In an empty engine, its prompt at once, one token a step."""
    scheduler = Scheduler(emptied(engine), SchedulerSettings(chunk_tokens=512, speculates=False))
    scheduler.add(request)
    tokens: tuple[int, ...] = ()
    while not scheduler.is_idle:
        for output in scheduler.step():
            tokens += output.tokens
    return tokens


def asked(seed: int, temperature: float) -> list[GenerationRequest]:
    """Prompts of three families, each with a beginning of its own that its members share."""
    random = np.random.default_rng(seed)
    beginnings = [tuple(random.integers(3, 90, 40).tolist()) for _ in range(3)]
    requests = []
    for number in range(12):
        shared = beginnings[int(random.integers(3))][: int(random.integers(10, 41))]
        own = tuple(random.integers(3, 90, int(random.integers(1, 30))).tolist())
        sampling = Sampling(temperature=temperature, seed=number)
        requests.append(
            GenerationRequest(number, shared + own, int(random.integers(4, 24)), sampling, priority=int(random.integers(-1, 2)))
        )
    return requests


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_joins_in_the_middle_gets_the_tokens_he_gets_alone(engine: GenerationEngine, seed: int, chunk: int, temperature: float) -> None:
    if temperature and not engine.can_verify:
        pytest.skip("its logits differ by rounding between batches, and a draw may land on the other side")
    requests = asked(seed, temperature)
    expected = {request.number: alone(engine, request) for request in requests}
    scheduler = Scheduler(emptied(engine), SchedulerSettings(waiting=16, chunk_tokens=chunk))
    got: dict[int, tuple[int, ...]] = {request.number: () for request in requests}
    random, waiting, left = np.random.default_rng(seed), list(requests), -1
    while waiting or not scheduler.is_idle:
        for _ in range(int(random.integers(0, 3))):
            if waiting:
                scheduler.add(waiting.pop(0))
        for output in scheduler.step():
            got[output.number] += output.tokens
        if left < 0 and len(waiting) < 6:
            left = next((number for number, tokens in got.items() if tokens and scheduler.cancel(number)), -1)
    assert scheduler.load.cached_tokens > 100, "prefixes were shared"
    for number, tokens in expected.items():
        assert got[number] == (tokens[: len(got[number])] if number == left else tokens)


def test_a_kept_prefix_changes_nothing(engine: GenerationEngine) -> None:
    prompt = tuple(np.random.default_rng(9).integers(3, 90, 70).tolist())
    requests = [GenerationRequest(number, prompt[:length], 30) for number, length in enumerate((70, 70, 69, 41, 70))]
    expected = [alone(engine, request) for request in requests]
    scheduler = Scheduler(emptied(engine))
    cached = []
    for request, tokens in zip(requests, expected):
        scheduler.add(request)
        outputs = []
        while not scheduler.is_idle:
            outputs += scheduler.step()
        assert sum((output.tokens for output in outputs), ()) == tokens
        cached.append(outputs[-1].cached_tokens)
    assert cached == [0, 69, 68, 40, 69]
