from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.engines import EngineError
from models.engines.fake import FakeGenerationEngine
from models.tasks.generation.prefix import place
from models.tasks.generation.sampling import Sampling
from models.tasks.generation.scheduler import Scheduler, SchedulerSettings
from models.tasks.generation.sequence import GenerationRequest, Output, Refused

VOCABULARY = 97


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, length]).integers(3, VOCABULARY, length).tolist())


def request(number: int, length: int = 10, tokens: int = 5, seed: int | None = None, priority: int = 0) -> GenerationRequest:
    return GenerationRequest(number, prompt(length, number if seed is None else seed), tokens, priority=priority)


def run(scheduler: Scheduler, steps: int = 10_000) -> list[list[Output]]:
    """The outputs of each step until nothing is left."""
    taken: list[list[Output]] = []
    while not scheduler.is_idle:
        taken.append(scheduler.step())
        assert len(taken) <= steps, "the scheduler does not come to an end"
    return taken


def tokens_of(taken: list[list[Output]]) -> dict[int, tuple[int, ...]]:
    tokens: dict[int, tuple[int, ...]] = {}
    for output in (output for outputs in taken for output in outputs):
        tokens[output.number] = tokens.get(output.number, ()) + output.tokens
    return tokens


def finishes(taken: list[list[Output]]) -> list[tuple[int, str]]:
    return [(output.number, output.finish) for outputs in taken for output in outputs if output.finish]


def alone(asked: GenerationRequest, context: int = 256) -> tuple[int, ...]:
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 1, context))
    scheduler.add(asked)
    return tokens_of(run(scheduler))[asked.number]


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 40),  # joins at this step
        st.integers(0, 3),  # family of prompts: equal families share beginnings
        st.integers(1, 60),  # length of the prompt
        st.integers(1, 12),  # max_tokens
        st.sampled_from([0.0, 1.0]),
        st.integers(0, 3),  # priority
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(asked=REQUESTS, slots=st.integers(1, 4), chunk=st.integers(1, 40), cancelled=st.sets(st.integers(0, 7), max_size=2))
def test_any_interleaving_gives_the_tokens_of_each_alone(
    asked: list[tuple[int, int, int, int, float, int]], slots: int, chunk: int, cancelled: set[int]
) -> None:
    texts = {family: prompt(60, family) for family in range(4)}
    requests = [
        GenerationRequest(
            number,
            texts[family][: length // 2] + prompt(length - length // 2, 100 + number),
            tokens,
            Sampling(temperature=temperature, seed=number, presence_penalty=0.5),
            stop_tokens=(5, 6),
            priority=priority,
        )
        for number, (_, family, length, tokens, temperature, priority) in enumerate(asked)
    ]
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, slots, 128), SchedulerSettings(waiting=8, chunk_tokens=chunk))
    taken: list[list[Output]] = []
    for step in range(41):
        for number, item in enumerate(requests):
            if asked[number][0] == step:
                scheduler.add(item)
        if step == 20:
            for number in cancelled:
                scheduler.cancel(number)
        taken.append(scheduler.step())
    taken += run(scheduler)
    got, ended = tokens_of(taken), finishes(taken)
    assert sorted(number for number, _ in ended) == list(range(len(requests))), "each sequence ends exactly once"
    for number, finish in ended:
        expected = alone(requests[number], 128)
        assert got[number] == (expected[: len(got[number])] if finish == "cancelled" else expected)


def test_sequences_join_and_leave_between_steps() -> None:
    engine = FakeGenerationEngine(VOCABULARY, 2, 64)
    scheduler = Scheduler(engine)
    scheduler.add(request(1, tokens=8))
    scheduler.step()
    scheduler.add(request(2, tokens=3))
    scheduler.add(request(3, tokens=3))
    run(scheduler)
    assert [len(step) for step in engine.steps] == [1, 2, 2, 2, 2, 2, 2, 1]


def test_a_long_prompt_does_not_stall_the_others() -> None:
    engine = FakeGenerationEngine(VOCABULARY, 3, 1024)
    scheduler = Scheduler(engine, SchedulerSettings(chunk_tokens=64))
    scheduler.add(request(1, 10, 40))
    scheduler.step()
    scheduler.add(request(2, 640, 1))
    taken = run(scheduler)
    assert max(len(item.tokens) for step in engine.steps for item in step) <= 64
    done = next(index for index, outputs in enumerate(taken) for output in outputs if output.number == 2)
    assert done == 9, "640 tokens are ten chunks"
    assert all(any(output.number == 1 and output.tokens for output in outputs) for outputs in taken[:10])


def test_a_short_prompt_passes_a_long_one_and_both_arrive() -> None:
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 8, 4096), SchedulerSettings(chunk_tokens=64, waiting=64))
    scheduler.add(request(0, 2048, 1))
    scheduler.step()
    ended: dict[int, int] = {}
    for step in range(1, 200):
        if step <= 100:
            scheduler.add(request(step, 60, 1))
        for output in scheduler.step():
            ended[output.number] = step
    assert ended[1] <= 3
    assert ended[0] <= 66, "every other step is the long prompt's"


def test_nobody_waits_for_ever_behind_higher_priorities() -> None:
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 1, 64), SchedulerSettings(overtakes=4))
    scheduler.add(request(0, 5, 1, priority=0))
    order: list[int] = []
    for number in range(1, 60):
        scheduler.add(request(number, 5, 1, priority=3))
        order += [output.number for output in scheduler.step()]
        if 0 in order:
            break
    assert order[0] == 1
    assert order.index(0) <= 4 * 3 + 1


def test_higher_priority_goes_first_and_equals_in_order() -> None:
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 1, 64))
    for number, priority in ((1, 0), (2, 5), (3, 0), (4, 5)):
        scheduler.add(request(number, priority=priority, tokens=1))
    assert [number for number, _ in finishes(run(scheduler))] == [2, 4, 1, 3]


@pytest.mark.parametrize(("slots", "most"), [(1, 1), (2, 1), (4, 3)])
def test_a_batch_leaves_one_slot_of_several_to_those_who_cannot_wait(slots: int, most: int) -> None:
    engine = FakeGenerationEngine(VOCABULARY, slots, 256)
    scheduler = Scheduler(engine, SchedulerSettings(overtakes=2))
    for number in range(8):
        scheduler.add(request(number, tokens=40, priority=-1))
    for _ in range(10):
        scheduler.step()
    assert (scheduler.load.running, scheduler.load.waiting) == (most, 8 - most)
    scheduler.add(request(100, tokens=2))
    outputs = scheduler.step()
    assert (100 in {output.number for output in outputs}) == (slots > 1), "its first token comes with the next step"
    taken = run(scheduler)
    assert sorted(number for number, _ in finishes([outputs, *taken])) == [*range(8), 100]
    assert max(len({item.slot for item in step}) for step in engine.steps) == slots


def test_a_batch_that_was_overtaken_often_still_leaves_the_slot_free() -> None:
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 2, 256), SchedulerSettings(overtakes=1))
    scheduler.add(request(0, tokens=100, priority=-1))
    scheduler.add(request(1, tokens=100, priority=-1))
    for number in range(2, 20):
        scheduler.add(request(number, tokens=1))
        assert number in {output.number for output in scheduler.step()}
    assert sorted(number for number, _ in finishes(run(scheduler))) == [0, 1]


def test_a_burst_on_free_slots_gets_slots_and_queue() -> None:
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 3, 64), SchedulerSettings(waiting=2))
    for number in range(5):
        scheduler.add(request(number))
    with pytest.raises(Refused):
        scheduler.add(request(5))
    assert len(finishes(run(scheduler))) == 5


def test_the_queue_is_bounded() -> None:
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 1, 64), SchedulerSettings(waiting=2))
    scheduler.add(request(1))
    scheduler.step()
    scheduler.add(request(2))
    scheduler.add(request(3))
    with pytest.raises(Refused, match="2 requests wait already") as refused:
        scheduler.add(request(4))
    assert refused.value.code == "busy"
    assert len(finishes(run(scheduler))) == 3


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (GenerationRequest(1, (), 5), "the prompt is empty"),
        (request(1, 64), "has 64 tokens; with an answer it must fit into 64"),
        (GenerationRequest(1, (3, VOCABULARY), 5), "outside the vocabulary of 97"),
        (GenerationRequest(1, (3, -1), 5), "outside the vocabulary"),
        (request(1, 5, 0), "max_tokens is 0"),
        (request(9), "numbered 9 is here already"),
        (replace(request(1), sampling=Sampling(temperature=-1)), "temperature is -1"),
    ],
)
def test_what_can_never_run_is_refused(asked: GenerationRequest, reason: str) -> None:
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 1, 64))
    scheduler.add(request(9))
    with pytest.raises(Refused, match=reason) as refused:
        scheduler.add(asked)
    assert refused.value.code == "invalid"


def test_cancel_frees_the_slot_within_one_step_even_in_the_prompt() -> None:
    engine = FakeGenerationEngine(VOCABULARY, 1, 512)
    scheduler = Scheduler(engine, SchedulerSettings(chunk_tokens=32))
    scheduler.add(request(1, 400))
    scheduler.add(request(2, 10, 1))
    scheduler.add(request(3, 10, 1))
    scheduler.step()
    assert scheduler.cancel(1)
    assert scheduler.cancel(3)
    assert not scheduler.cancel(1)
    assert [(output.number, output.finish) for output in scheduler.step()] == [(1, "cancelled"), (3, "cancelled"), (2, "length")]
    assert scheduler.is_idle
    assert len(engine.steps) == 2


def test_deadlines_end_running_and_waiting_sequences() -> None:
    now = [100.0]
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 1, 64), clock=lambda: now[0])
    scheduler.add(replace(request(1, tokens=50), deadline=110.0))
    scheduler.add(replace(request(2), deadline=105.0))
    scheduler.add(replace(request(3, tokens=1), deadline=200.0))
    scheduler.step()
    now[0] = 106.0
    assert [(output.number, output.finish) for output in scheduler.step()] == [(2, "deadline"), (1, None)]
    now[0] = 110.0
    outputs = scheduler.step()
    assert [(output.number, output.finish) for output in outputs] == [(1, "deadline"), (3, "length")]
    assert outputs[0].generated_tokens == 2


def test_the_time_until_a_slot_is_told() -> None:
    now = [100.0]
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 1, 64), clock=lambda: now[0])
    for number in (1, 2):
        scheduler.add(request(number, tokens=2))
    waited: dict[int, float] = {}
    while not scheduler.is_idle:
        waited.update({output.number: output.queued_s for output in scheduler.step() if output.finish})
        now[0] += 5.0
    assert waited == {1: 0.0, 2: 10.0}


def test_ends_at_stop_tokens_max_tokens_and_capacity() -> None:
    free = alone(request(1, 10, 20))
    stopped = replace(request(1, 10, 20), stop_tokens=(free[7],))
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 3, 32))
    scheduler.add(stopped)
    scheduler.add(request(2, 10, 4))
    scheduler.add(request(3, 30, 100))
    taken = run(scheduler)
    last = {output.number: output for outputs in taken for output in outputs if output.finish}
    first = free.index(free[7])
    assert tokens_of(taken)[1] == free[:first]
    assert (last[1].finish, last[1].tokens, last[1].generated_tokens) == ("stop", (), first)
    assert (last[2].finish, last[2].generated_tokens, last[2].prompt_tokens) == ("length", 4, 10)
    assert (last[3].finish, last[3].generated_tokens) == ("length", 2), "30 of prompt and 2 of answer fill 32"


def test_a_next_turn_goes_on_in_the_slot_of_the_last() -> None:
    engine = FakeGenerationEngine(VOCABULARY, 2, 256)
    scheduler = Scheduler(engine)
    first = request(1, 50, 10)
    scheduler.add(first)
    answer = tokens_of(run(scheduler))[1]
    longer = GenerationRequest(2, first.prompt + answer + prompt(20, 9), 3)
    scheduler.add(longer)
    taken = run(scheduler)
    assert taken[0][0].cached_tokens == 59, "the last token of the answer was never run"
    assert tokens_of(taken)[2] == alone(longer)
    assert len(engine.steps[10][0].tokens) == 21


def test_a_shared_system_prompt_is_copied_also_from_a_running_sequence() -> None:
    system = prompt(100, 5)
    asked = [GenerationRequest(number, system + prompt(10, 50 + number), 20) for number in range(3)]
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 4, 256))
    scheduler.add(asked[0])
    scheduler.step()
    scheduler.add(asked[1])
    scheduler.add(asked[2])
    taken = run(scheduler)
    assert {output.number: output.cached_tokens for outputs in taken for output in outputs} == {0: 0, 1: 100, 2: 100}
    assert tokens_of(taken)[2] == alone(asked[2])
    assert scheduler.load.cached_tokens == 200


def test_equal_prompts_that_come_at_once_are_computed_once() -> None:
    engine = FakeGenerationEngine(VOCABULARY, 4, 512)
    scheduler = Scheduler(engine, SchedulerSettings(chunk_tokens=64))
    for number in range(4):
        scheduler.add(GenerationRequest(number, prompt(300, 1) + (number + 5,), 1))
    run(scheduler)
    computed = sum(len(item.tokens) for step in engine.steps for item in step)
    assert computed <= 301 + 3 + 64, "what was left of one step's budget may be spent before there is something to copy"


def test_a_prefix_takes_a_slot_in_place_only_if_little_is_lost() -> None:
    old, text = list(prompt(100, 1)), prompt(60, 2)
    assert place((*old, 5), [old, list(text)], [0, 1]).slot == 0
    moved = place((*old[:20], 5, 6), [old, list(text)], [0, 1])
    assert (moved.slot, moved.source, moved.shared) == (1, 0, 20)
    assert place((*old[:20], 5, 6), [old, list(text)], [0]).slot == 0
    assert place(text[::-1], [old, []], [0, 1]).slot == 1
    assert place(tuple(old), [old], [0]).shared == 99, "the last token is always run"


def test_logits_that_are_not_finite_are_an_engine_error() -> None:
    class Broken(FakeGenerationEngine):
        def _logits(self, tokens: object) -> np.ndarray:
            return np.full(self.vocabulary, np.nan, np.float32)

    scheduler = Scheduler(Broken())
    scheduler.add(request(1))
    with pytest.raises(EngineError, match="not finite"):
        scheduler.step()


def test_log_probabilities_come_with_their_tokens() -> None:
    scheduler = Scheduler(FakeGenerationEngine())
    scheduler.add(replace(request(1, tokens=2), sampling=Sampling(top_logprobs=2)))
    for outputs in run(scheduler):
        assert outputs[0].logprobs[0][0][0] == outputs[0].tokens[0]
        assert len(outputs[0].logprobs[0]) == 3
