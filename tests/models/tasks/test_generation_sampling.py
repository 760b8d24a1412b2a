from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tasks.generation.sampling import Sampling, adjust, choose, draw, log_probabilities


def rows(seed: int, count: int, vocabulary: int = 2000) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, vocabulary)).astype(np.float32) * 3


def reference_nucleus(scores: np.ndarray, sampling: Sampling) -> dict[int, float]:
    """Probabilities of the tokens that top-k and top-p leave, by sorting everything."""
    order = np.argsort(-scores.astype(np.float64), kind="stable")[: sampling.top_k or None]
    weights = np.exp(scores[order].astype(np.float64) / sampling.temperature)
    probabilities = weights / weights.sum()
    before = np.cumsum(probabilities) - probabilities
    kept = before < sampling.top_p
    return dict(zip(order[kept].tolist(), (probabilities[kept] / probabilities[kept].sum()).tolist()))


def test_greedy_takes_the_largest() -> None:
    logits = rows(1, 5)
    tokens = choose(logits, [Sampling()] * 5, [{}] * 5, [np.random.default_rng()] * 5)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 4),
    top_k=st.integers(0, 30),
    top_p=st.floats(0.05, 1),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_a_draw_stays_in_the_nucleus(seed: int, temperature: float, top_k: int, top_p: float, uniform: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    scores = rows(seed, 1)[0]
    allowed = reference_nucleus(scores, Sampling(temperature=temperature, top_k=top_k, top_p=min(1.0, top_p + 1e-9)))
    assert draw(scores, sampling, uniform) in allowed


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.8, top_k=5),
        Sampling(temperature=1.2, top_p=0.9),
        Sampling(temperature=3.0, top_p=0.95),  # a nucleus larger than the guess
        Sampling(temperature=0.7, top_k=50, top_p=0.8),
    ],
)
def test_draws_follow_the_probabilities(sampling: Sampling) -> None:
    scores = rows(5, 1, 1500)[0]
    expected = reference_nucleus(scores, sampling)
    count = 4000
    drawn = Counter(draw(scores, sampling, (index + 0.5) / count) for index in range(count))
    for token, probability in expected.items():
        assert drawn[token] / count == pytest.approx(probability, abs=2.0 / count + 1e-9)


def test_a_seed_repeats_and_the_neighbours_do_not_matter() -> None:
    logits = rows(7, 6)
    sampling = Sampling(temperature=1.0, seed=42)

    def run(neighbours: int) -> list[int]:
        generator, others = np.random.default_rng(42), [np.random.default_rng(index) for index in range(neighbours)]
        tokens = []
        for step in range(6):
            batch = np.concatenate([rows(step + 50, neighbours), logits[step : step + 1]])
            chosen = choose(batch, [*[Sampling(temperature=2.0)] * neighbours, sampling], [{}] * (neighbours + 1), [*others, generator])
            tokens.append(int(chosen[-1]))
        return tokens

    assert run(0) == run(0) == run(3)
    assert len(set(run(0))) > 1


def test_penalties_and_biases_are_added_as_the_api_defines() -> None:
    row = np.zeros(4, np.float32)
    penalised = adjust(row, Sampling(presence_penalty=0.5, frequency_penalty=0.25), {1: 3, 2: 1})
    np.testing.assert_allclose(penalised, [0, -1.25, -0.75, 0])
    biased = adjust(row, Sampling(presence_penalty=0.5, logit_bias=((1, 2.5), (3, -100.0))), {1: 9})
    np.testing.assert_allclose(biased, [0, 2, 0, -100])
    assert not row.any(), "the engine's logits are not to be changed"
    assert adjust(row, Sampling(presence_penalty=1.0), {}) is row
    assert adjust(row, Sampling(temperature=1.0), {1: 1}) is row


def test_only_allowed_tokens_are_chosen_greedy_or_drawn() -> None:
    logits = rows(3, 3)
    allowed = np.zeros(logits.shape[1], bool)
    allowed[logits[0].argsort()[:3]] = True
    samplings = [
        Sampling(),
        Sampling(temperature=2.0),
        Sampling(temperature=1.0, top_p=0.3, logit_bias=((int(np.flatnonzero(allowed)[0]), 5.0),)),
    ]
    generators = [np.random.default_rng(index) for index in range(3)]
    for _ in range(20):
        chosen = choose(logits, samplings, [{}] * 3, generators, [allowed, None, allowed])
        assert chosen[0] == np.flatnonzero(allowed)[logits[0][allowed].argmax()]
        assert allowed[chosen[2]]


def test_rows_without_extras_choose_as_alone() -> None:
    logits = rows(4, 3)
    bias = Sampling(logit_bias=((7, 100.0),))
    chosen = choose(logits, [Sampling(), bias, Sampling()], [{1: 1}] * 3, [np.random.default_rng()] * 3)
    assert chosen.tolist() == [int(logits[0].argmax()), 7, int(logits[2].argmax())]


def test_log_probabilities_are_those_of_the_model() -> None:
    logits = rows(9, 3, 50)
    result = log_probabilities(logits, [4, 5, 6], [Sampling(top_logprobs=-1), Sampling(top_logprobs=0), Sampling(top_logprobs=3)])
    assert result[0] is None
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    assert result[1] is not None
    assert result[2] is not None
    assert [token for token, _ in result[1]] == [5]
    assert result[1][0][1] == pytest.approx(exact[1, 5])
    assert result[2][0][0] == 6
    assert result[2][0][1] == pytest.approx(exact[2, 6])
    assert [token for token, _ in result[2][1:]] == np.argsort(-logits[2])[:3].tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_model_is_noticed(bad: float) -> None:
    logits = rows(1, 2)
    logits[1, 3] = bad
    with pytest.raises(ValueError, match="row 1 are not finite"):
        choose(logits, [Sampling()] * 2, [{}] * 2, [np.random.default_rng()] * 2)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=-1), Sampling(temperature=float("nan")), Sampling(top_p=0), Sampling(top_p=1.5), Sampling(top_k=-1),
        Sampling(seed=-1), Sampling(presence_penalty=3), Sampling(frequency_penalty=-3), Sampling(top_logprobs=21),
        Sampling(logit_bias=((-1, 0.0),)), Sampling(logit_bias=((5, 101.0),)),
        Sampling(logit_bias=((5, float("nan")),)), Sampling(logit_bias=tuple((token, 1.0) for token in range(1025))),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(sampling: Sampling) -> None:
    assert sampling.problem() is not None
    assert Sampling(temperature=0.7, top_p=0.9, top_k=40, seed=1, top_logprobs=20).problem() is None
