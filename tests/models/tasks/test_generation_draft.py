"""Guessing ahead changes how many tokens a step gives, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.engines.fake import FakeGenerationEngine
from models.tasks.generation.draft import MAX_DRAFT, Draft
from models.tasks.generation.sampling import Sampling
from models.tasks.generation.scheduler import Scheduler, SchedulerSettings
from models.tasks.generation.sequence import GenerationRequest, Output

VOCABULARY = 97


class Repetitive(FakeGenerationEngine):
    """Its logits depend on the last token alone, and favour few: its texts go in circles."""

    def _logits(self, tokens: Sequence[int]) -> np.ndarray:
        return super()._logits(tokens[-1:]) * 1.5


def outputs_of(requests: list[GenerationRequest], speculates: bool, slots: int = 3, joins: int = 2) -> tuple[list[Output], Scheduler]:
    engine = Repetitive(VOCABULARY, slots, 128)
    scheduler = Scheduler(engine, SchedulerSettings(waiting=8, chunk_tokens=24, speculates=speculates))
    outputs: list[Output] = []
    waiting = list(requests)
    while waiting or not scheduler.is_idle:
        for request in waiting[:joins]:
            scheduler.add(request)
        del waiting[:joins]
        outputs += scheduler.step()
    return outputs, scheduler


def answers(outputs: list[Output]) -> dict[int, tuple[tuple[int, ...], tuple[object, ...], str | None, int]]:
    """Tokens, log probabilities, finish and count of each sequence."""
    found: dict[int, tuple[tuple[int, ...], tuple[object, ...], str | None, int]] = {}
    for output in outputs:
        tokens, logprobs, _, _ = found.get(output.number, ((), (), None, 0))
        found[output.number] = (tokens + output.tokens, logprobs + output.logprobs, output.finish, output.generated_tokens)
    return found


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.0, 0.4, 1.0]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 9),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    top_logprobs=st.sampled_from([-1, 2]),
)
REQUESTS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 70), st.integers(1, 90), SAMPLINGS), min_size=1, max_size=7)


@settings(max_examples=80, deadline=None)
@given(asked=REQUESTS, slots=st.integers(1, 4), joins=st.integers(1, 3))
def test_guessing_changes_no_token(asked: list[tuple[int, int, int, Sampling]], slots: int, joins: int) -> None:
    """Greedy and drawn, with penalties, log probabilities, stop tokens and full slots; also of the next prompt in the same slot."""
    requests = [
        GenerationRequest(
            number,
            tuple((np.random.default_rng(family).integers(3, VOCABULARY, 9).tolist() * 8)[:length]),
            tokens,
            sampling,
            stop_tokens=(5, 6),
        )
        for number, (family, length, tokens, sampling) in enumerate(asked)
    ]
    guessed, _ = outputs_of(requests, True, slots, joins)
    plain, _ = outputs_of(requests, False, slots, joins)
    assert answers(guessed) == answers(plain)


def test_a_text_that_repeats_itself_takes_a_fraction_of_the_steps() -> None:
    request = GenerationRequest(1, (7, 8, 9), 100)
    guessed, scheduler = outputs_of([request], True)
    plain, _ = outputs_of([request], False)
    assert len(plain) == 100
    assert len(guessed) < 40
    load = scheduler.load
    assert load.generated_tokens == 100
    assert 60 <= load.kept_tokens <= load.guessed_tokens <= 90


def test_the_engine_holds_what_was_said_and_no_guess() -> None:
    engine = Repetitive(VOCABULARY, 1, 128)
    scheduler = Scheduler(engine)
    request = GenerationRequest(1, (7, 8, 9) * 5, 60, Sampling(temperature=0.5, seed=3))
    scheduler.add(request)
    said: list[int] = []
    while len(said) < request.max_tokens:
        said += [token for output in scheduler.step() for token in output.tokens]
        assert len(request.prompt) + len(said) - 1 <= engine.length(0) <= len(request.prompt) + len(said)
    following = GenerationRequest(2, (*request.prompt, *said[:-1], 9, 9), 5)
    scheduler.add(following)
    outputs: list[Output] = []
    while not scheduler.is_idle:
        outputs += scheduler.step()
    assert outputs[0].cached_tokens >= len(request.prompt) + len(said) - 1
    fresh, _ = outputs_of([following], False)
    assert answers(outputs)[2][0] == answers(fresh)[2][0]


def test_engines_that_cannot_verify_are_given_no_guesses() -> None:
    engine = Repetitive(VOCABULARY, 1, 128)
    engine.can_verify = False
    scheduler = Scheduler(engine)
    scheduler.add(GenerationRequest(1, (7, 8, 9), 100))
    while not scheduler.is_idle:
        scheduler.step()
    assert [len(item.tokens) for step in engine.steps for item in step] == [3] + [1] * 99


def test_the_longest_agreement_decides_then_the_latest() -> None:
    draft = Draft([1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 8, 2, 3, 4, 70, 1, 2, 3, 4], 100)
    assert draft.guess(1, 0.25) == (50,)
    assert Draft([9, 2, 3, 4, 60, 8, 2, 3, 4, 70, 5, 2, 3, 4], 100).guess(1, 0.25) == (70,)
    assert Draft([1, 2, 3, 4, 5, 6, 3, 4], 100).guess(4, 0.25) == (), "two tokens are chance"
    assert Draft([1, 2, 3, 1, 2, 3, 1], 100).guess(0, 0.25) == ()


def test_a_circle_is_guessed_beyond_its_end() -> None:
    draft = Draft([1, 2, 3] * 3, 200)
    for _ in range(6):
        draft.learn(8, 8)
    assert draft.guess(10, 0.25) == (1, 2, 3, 1, 2, 3, 1, 2, 3, 1)


def test_guesses_grow_with_luck_end_with_failure_and_come_back() -> None:
    draft = Draft([1, 2, 3] * 5, 10_000)
    first = len(draft.guess(100, 0.25))
    for _ in range(8):
        draft.learn(len(draft.guess(100, 0.25)), len(draft.guess(100, 0.25)))
    assert first < len(draft.guess(100, 0.25)) == MAX_DRAFT
    assert len(draft.guess(100, 0.6)) <= MAX_DRAFT
    wasted = []
    for _ in range(200):
        guess = draft.guess(100, 0.25)
        wasted.append(len(guess))
        if guess:
            draft.learn(len(guess), 0)
    assert wasted[0] == MAX_DRAFT
    assert sum(wasted[10:]) <= 20, "a bad guesser is asked seldom"
    assert sum(wasted[100:]) >= 2, "but it is asked again"


@pytest.mark.parametrize("price", [0.25, 0.45, 0.9])
def test_a_higher_price_makes_shorter_guesses(price: float) -> None:
    draft = Draft([1, 2, 3] * 5, 100)
    for _ in range(3):
        draft.learn(3, 2)
    assert len(draft.guess(50, price)) <= len(draft.guess(50, price / 2))
