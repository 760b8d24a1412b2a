"""The worker's text service on the deterministic fake engine, which passes the contract test of the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.worker.loop import Refusal
from agent.worker.text import TextService
from agent.worker_protocol import Cancel, CloseModel, Done, Failed, Generate, OpenModel, Tokens
from models.engines import DeviceLost, EngineError, EngineOptions
from models.engines.fake import FakeGenerationEngine
from models.record import RecordError
from models.tasks.generation.scheduler import SchedulerSettings

MANIFEST: dict[str, Any] = {
    "name": "fake",
    "task": "generation",
    "format": "gguf",
    "licence": "Apache-2.0",
    "summary": "",
    "files": {"model": {"source": "file:/nowhere"}},
    "generation": {"context_tokens": 64},
}
PROMPT = np.array([5, 6, 7], "<i4").tobytes()


WARM_UP = 2  # steps when a model is opened


class Fragile(FakeGenerationEngine):
    """Fails in the step in which its time has come, those of the warm-up not counted."""

    def __init__(self, good_steps: int) -> None:
        super().__init__(slots=2, context_tokens=64)
        self.good_steps = good_steps + WARM_UP
        self.is_closed = False

    def step(self, batch: Any) -> np.ndarray:
        self.good_steps -= 1
        if self.good_steps < 0:
            raise EngineError("the device lost its context")
        return super().step(batch)

    def close(self) -> None:
        self.is_closed = True
        super().close()


class Served:
    def __init__(self, good_steps: int = 10**9, settings: SchedulerSettings | None = None) -> None:
        self.reports: list[Any] = []
        self.engines: list[Fragile] = []
        self.good_steps = good_steps
        self.service = TextService(lambda report, payload=b"": self.reports.append(report), lambda: None, self.open, settings)

    def open(self, folder: Path, options: EngineOptions) -> Fragile:
        assert (folder, options.slots) == (Path("/models/fake"), 2)
        self.engines.append(Fragile(self.good_steps))
        return self.engines[-1]

    def opened(self) -> Served:
        self.service.handle(OpenModel(1, "fake", MANIFEST, "/models/fake", {"slots": 2}), b"")
        assert self.reports.pop() == Done(1, {"provider": "cpu", "slots": 2, "context_tokens": 64, "vocabulary": 97, "adapters": []})
        return self

    def settle(self) -> None:
        for _ in range(1000):
            if not self.service.step():
                return
        raise AssertionError("the service never came to rest")

    def ends(self) -> list[tuple[int, str]]:
        return [
            (report.request, report.code if isinstance(report, Failed) else "done")
            for report in self.reports
            if isinstance(report, (Done, Failed))
        ]


def test_tokens_then_done_with_the_counts() -> None:
    served = Served().opened()
    served.service.handle(Generate(2, "fake", 4, top_logprobs=1), PROMPT)
    served.settle()
    *tokens, done = served.reports
    assert [len(report.tokens) for report in tokens] == [1, 1, 1, 1]
    assert all(report.logprobs[0][0][0] == report.tokens[0] for report in tokens)
    queued_s = done.result.pop("queued_s")
    assert done == Done(2, {"finish": "length", "prompt_tokens": 3, "generated_tokens": 4, "cached_tokens": 0})
    assert 0 <= queued_s < 60


def test_two_requests_advance_together() -> None:
    served = Served().opened()
    served.service.handle(Generate(2, "fake", 5), PROMPT)
    served.service.handle(Generate(3, "fake", 5), PROMPT)
    served.settle()
    order = [report.request for report in served.reports if isinstance(report, Tokens)]
    assert order.count(2) == order.count(3) == 5
    assert order != sorted(order)


def test_cancel_deadline_and_close_end_what_runs() -> None:
    served = Served().opened()
    served.service.handle(Generate(2, "fake", 50), PROMPT)
    served.service.handle(Generate(3, "fake", 50, deadline_s=0.0), PROMPT)
    served.service.handle(Generate(4, "fake", 50), PROMPT)
    served.service.step()
    served.service.handle(Cancel(5, 2), b"")
    served.service.step()
    served.service.handle(CloseModel(6, "fake"), b"")
    assert sorted(served.ends()) == [(2, "cancelled"), (3, "deadline"), (4, "cancelled"), (6, "done")]
    assert served.engines[0].is_closed
    assert not served.service.step()
    assert served.service.status() == ({}, {})


@pytest.mark.parametrize(
    ("message", "payload", "code"),
    [
        (Generate(2, "other", 4), PROMPT, "unknown_model"),
        (Generate(2, "fake", 4), PROMPT[:-1], "invalid"),
        (Generate(2, "fake", 4), b"", "invalid"),
        (Generate(2, "fake", 0), PROMPT, "invalid"),
        (Generate(2, "fake", 4, top_p=0.0), PROMPT, "invalid"),
        (Generate(2, "fake", 4), bytes(4 * 64), "invalid"),
        (Generate(2, "fake", 4), np.array([97], "<i4").tobytes(), "invalid"),
        (Generate(2, "fake", 4, adapter="french"), PROMPT, "invalid"),
    ],
)
def test_what_cannot_be_generated_is_refused(message: Generate, payload: bytes, code: str) -> None:
    served = Served().opened()
    with pytest.raises(Refusal) as refusal:
        served.service.handle(message, payload)
    assert refusal.value.code == code


def test_too_many_waiting_are_busy() -> None:
    served = Served(settings=SchedulerSettings(waiting=1)).opened()
    for number in range(2, 5):  # two slots to come, and one that waits
        served.service.handle(Generate(number, "fake", 4), PROMPT)
    with pytest.raises(Refusal) as refusal:
        served.service.handle(Generate(5, "fake", 4), PROMPT)
    assert (refusal.value.code, refusal.value.retry_after_s) == ("busy", 7.5)


def test_who_gives_way_in_a_full_queue_is_told_so_and_when_to_come_back() -> None:
    served = Served(settings=SchedulerSettings(waiting=1)).opened()
    for number in range(2, 5):
        served.service.handle(Generate(number, "fake", 4, tenant="many"), PROMPT)
    served.service.handle(Generate(5, "fake", 4, tenant="one"), PROMPT)
    served.settle()
    failed = next(report for report in served.reports if isinstance(report, Failed))
    assert (failed.request, failed.code) == (4, "busy")
    assert failed.retry_after_s is not None
    assert 1 <= failed.retry_after_s <= 60
    assert sorted(served.ends()) == [(2, "done"), (3, "done"), (4, "busy"), (5, "done")]


def test_an_adapter_is_named_and_the_model_says_which_it_has() -> None:
    reports: list[Any] = []
    engine = FakeGenerationEngine(slots=2, context_tokens=64, adapters=("polite", "terse"))
    service = TextService(lambda report, payload=b"": reports.append(report), lambda: None, lambda folder, options: engine)
    service.handle(OpenModel(1, "fake", MANIFEST, "/models/fake"), b"")
    assert reports.pop().result["adapters"] == ["polite", "terse"]
    service.handle(Generate(2, "fake", 2, adapter="terse"), PROMPT)
    while service.step():
        pass
    assert {item.adapter for step in engine.steps[WARM_UP:] for item in step} == {2}
    with pytest.raises(Refusal, match="no adapter 'french'; it has polite, terse"):
        service.handle(Generate(3, "fake", 2, adapter="french"), PROMPT)


def test_a_broken_engine_fails_its_requests_and_is_opened_anew() -> None:
    served = Served(good_steps=3).opened()
    served.service.handle(Generate(2, "fake", 50), PROMPT)
    served.service.handle(Generate(3, "fake", 50), PROMPT)
    served.settle()
    assert served.ends() == [(2, "engine"), (3, "engine")]
    assert [engine.is_closed for engine in served.engines] == [True, False]
    served.service.handle(Generate(4, "fake", 2), PROMPT)
    served.settle()
    assert served.ends()[-1] == (4, "done")


def test_a_lost_device_ends_the_worker_instead_of_one_request() -> None:
    class Lost(Fragile):
        def step(self, batch: Any) -> np.ndarray:
            try:
                return super().step(batch)
            except EngineError as error:
                raise DeviceLost("CUDA: cudaStreamSynchronize failed with error 700") from error

    served = Served()
    served.service = TextService(lambda report, payload=b"": served.reports.append(report), lambda: None, lambda folder, options: Lost(0))
    served.opened()
    served.service.handle(Generate(2, "fake", 5), PROMPT)
    with pytest.raises(DeviceLost):
        served.service.step()
    assert served.ends() == []


def test_an_option_that_nobody_knows_is_named() -> None:
    served = Served()
    with pytest.raises(RecordError, match="colour"):
        served.service.handle(OpenModel(3, "other", MANIFEST, "/models/fake", {"colour": 1}), b"")


def test_an_engine_that_takes_over_lets_the_one_before_end_its_answers() -> None:
    served = Served().opened()
    served.service.handle(Generate(2, "fake", 4), PROMPT)
    served.service.step()
    served.service.handle(OpenModel(3, "fake", MANIFEST, "/models/fake", {"slots": 2}), b"")
    served.service.handle(Generate(4, "fake", 2), PROMPT)
    assert not served.engines[0].is_closed
    served.settle()
    assert served.ends() == [(3, "done"), (4, "done"), (2, "done")]
    assert [engine.is_closed for engine in served.engines] == [True, False]


def test_an_answer_of_an_engine_that_leaves_can_be_cancelled_and_its_failure_touches_no_other() -> None:
    served = Served(good_steps=2).opened()
    served.service.handle(Generate(2, "fake", 40), PROMPT)
    served.service.step()
    served.good_steps = 10**9
    served.service.handle(OpenModel(3, "fake", MANIFEST, "/models/fake", {"slots": 2}), b"")
    served.service.handle(Generate(4, "fake", 8), PROMPT)
    served.settle()
    assert served.ends() == [(3, "done"), (2, "engine"), (4, "done")]
    assert [engine.is_closed for engine in served.engines] == [True, False]


def test_without_room_for_both_the_engine_before_goes_on() -> None:
    served = Served().opened()
    served.service.handle(Generate(2, "fake", 4), PROMPT)
    with pytest.raises(RecordError):
        served.service.handle(OpenModel(3, "fake", MANIFEST, "/models/fake", {"slots": "many"}), b"")
    served.settle()
    assert served.ends() == [(2, "done")]


def test_an_engine_that_cannot_run_is_not_served() -> None:
    served = Served(good_steps=-1)
    with pytest.raises(EngineError, match="lost its context"):
        served.opened()
    assert [engine.is_closed for engine in served.engines] == [True]
    assert served.service.status() == ({}, {})


def test_warming_up_leaves_nothing_behind() -> None:
    served = Served().opened()
    assert [engine.length(0) for engine in served.engines] == [0]
    assert len(served.engines[0].steps) == WARM_UP
