"""Who gets the slots when many want them, and what those are told who get none."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from models.engines.fake import FakeGenerationEngine
from models.tasks.generation.scheduler import Scheduler, SchedulerSettings
from models.tasks.generation.sequence import GenerationRequest, Output, Refused

VOCABULARY = 97


def request(number: int, tenant: str = "", length: int = 8, tokens: int = 6, priority: int = 0) -> GenerationRequest:
    prompt = np.random.default_rng([number, length]).integers(3, VOCABULARY, length).tolist()
    return GenerationRequest(number, tuple(prompt), tokens, priority=priority, tenant=tenant)


class House:
    """Clients of several tenants that ask again as soon as they have their answer."""

    def __init__(self, clients: dict[str, int], lengths: dict[str, tuple[int, int]], slots: int = 4, waiting: int = 64) -> None:
        self.scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, slots, 128), SchedulerSettings(waiting=waiting, chunk_tokens=64))
        self.lengths = lengths
        self.numbers = itertools.count()
        self.tenant_of: dict[int, str] = {}
        self.served: Counter[str] = Counter()
        self.random = np.random.default_rng(3)
        for tenant, count in clients.items():
            for _ in range(count):
                self.ask(tenant)

    def ask(self, tenant: str) -> None:
        number = next(self.numbers)
        self.tenant_of[number] = tenant
        prompt, answer = self.lengths[tenant]
        self.scheduler.add(request(number, tenant, int(self.random.integers(1, 2 * prompt)), int(self.random.integers(1, 2 * answer))))

    def run(self, steps: int) -> Counter[str]:
        """Work done for each tenant meanwhile: a generated token counts as four of a prompt."""
        self.served.clear()
        for _ in range(steps):
            for output in self.scheduler.step():
                tenant = self.tenant_of[output.number]
                self.served[tenant] += 4 * len(output.tokens)
                if output.finish:
                    self.served[tenant] += output.prompt_tokens - output.cached_tokens
                    self.ask(tenant)
        return self.served


@pytest.mark.parametrize(
    ("clients", "lengths"),
    [
        ({"a": 40, "b": 5}, {"a": (20, 10), "b": (20, 10)}),
        ({"a": 20, "b": 20}, {"a": (40, 20), "b": (5, 3)}),
        ({"a": 30, "b": 8, "c": 8}, {"a": (10, 10), "b": (30, 10), "c": (10, 25)}),
    ],
)
def test_tenants_that_want_more_than_there_is_get_equal_shares(clients: dict[str, int], lengths: dict[str, tuple[int, int]]) -> None:
    house = House(clients, lengths)
    house.run(100)
    served = house.run(1500)
    assert min(served.values()) > 0.9 * max(served.values()), served


def test_a_tenant_alone_uses_everything_and_owes_nothing_for_it() -> None:
    house = House({"a": 20}, {"a": (10, 10), "b": (10, 10)})
    house.run(300)
    assert house.scheduler.load.running == 4
    for _ in range(6):
        house.ask("b")
    served = house.run(600)
    assert min(served.values()) > 0.85 * max(served.values()), f"{served}: neither starves for what was before"


def test_a_tenant_that_comes_back_is_owed_nothing() -> None:
    house = House({"a": 12, "b": 1}, {"a": (10, 10), "b": (10, 10)})
    house.run(500)  # one client of b cannot use half of everything
    for _ in range(11):
        house.ask("b")
    served = house.run(400)
    assert served["a"] > 0.75 * served["b"], served


def test_priority_comes_before_shares() -> None:
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 1, 64))
    for number, (tenant, priority) in enumerate([("a", 1), ("a", 1), ("a", 1), ("b", 0), ("b", 0)]):
        scheduler.add(request(number, tenant, tokens=1, priority=priority))
    ended: list[int] = []
    while not scheduler.is_idle:
        ended += [output.number for output in scheduler.step()]
    assert ended == [0, 1, 2, 3, 4]


def test_turns_of_others_do_not_count_as_overtaking() -> None:
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 1, 64), SchedulerSettings(waiting=64, overtakes=2))
    for number in range(20):
        scheduler.add(request(number, "a", tokens=1))
    for number in range(20, 30):
        scheduler.add(request(number, "b", tokens=1))
    ended: list[int] = []
    for _ in range(10):
        ended += [output.number for output in scheduler.step()]
    assert sum(number >= 20 for number in ended) in (4, 5, 6)


def busy(outputs: list[Output]) -> list[int]:
    return [output.number for output in outputs if output.finish == "busy"]


def test_a_full_queue_is_shared_too() -> None:
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 1, 64), SchedulerSettings(waiting=4))
    for number in range(5):
        scheduler.add(request(number, "a", tokens=30))
        scheduler.step()
    with pytest.raises(Refused) as refused:
        scheduler.add(request(5, "a"))
    assert refused.value.code == "busy"
    scheduler.add(request(6, "b"))
    scheduler.add(request(7, "b"))
    with pytest.raises(Refused):
        scheduler.add(request(8, "b"))
    assert busy(scheduler.step()) == [4, 3], "the last of who has most"
    scheduler.add(request(9, "c"))
    with pytest.raises(Refused):
        scheduler.add(request(10, "a"))
    scheduler.add(request(11, "a", priority=1))
    assert len(busy(scheduler.step())) == 2
    assert scheduler.load.waiting == 4


def test_who_is_refused_is_told_when_there_may_be_room() -> None:
    now = [0.0]
    scheduler = Scheduler(FakeGenerationEngine(VOCABULARY, 2, 128), SchedulerSettings(waiting=6), clock=lambda: now[0])
    assert scheduler.retry_after_s == 1.0
    for number in range(8):
        scheduler.add(request(number, tokens=10))
        if number == 1:
            scheduler.step()
    with pytest.raises(Refused) as refused:
        scheduler.add(request(8))
    assert refused.value.retry_after_s == 6 * 5.0 / 2, "nothing has ended yet: five seconds are a guess"
    for _ in range(9):
        now[0] += 2.0
        scheduler.step()
    assert scheduler.load.waiting == 6
    assert scheduler.retry_after_s == pytest.approx(6 * 18.0 / 2)
    scheduler.step()
    now[0] += 1000.0
    for _ in range(9):
        scheduler.step()
    assert scheduler.load.waiting == 4
    assert scheduler.retry_after_s == 60.0


def test_with_another_adapter_nothing_is_shared_and_answers_differ() -> None:
    engine = FakeGenerationEngine(VOCABULARY, 4, 256, adapters=("one", "two"))
    scheduler = Scheduler(engine)
    asked = request(0, length=50, tokens=5)
    cached: dict[int, int] = {}
    texts: dict[int, tuple[int, ...]] = {}
    for number, adapter in enumerate([0, 1, 2, 1, 0]):
        scheduler.add(replace(asked, number=number, adapter=adapter))
        while not scheduler.is_idle:
            for output in scheduler.step():
                cached[number] = output.cached_tokens
                texts[number] = texts.get(number, ()) + output.tokens
    assert cached == {0: 0, 1: 0, 2: 0, 3: 49, 4: 49}
    assert texts[0] == texts[4]
    assert texts[1] == texts[3]
    assert len({texts[0], texts[1], texts[2]}) == 3
    with pytest.raises(Refused, match="no adapter 3; the model has 2"):
        scheduler.add(replace(asked, adapter=3))
