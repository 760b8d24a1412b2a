"""Keys and what each may ask: the file, the buckets, the door."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.http.allowance import Allowances
from agent.http.errors import ApiError
from agent.http.keys import KeyRules, KeysError, KeysFile, read_keys
from tests.agent.http.conftest import House

ONE, TWO = (hashlib.sha256(key).digest() for key in (b"one", b"two"))
ASK = {"model": "parrot", "messages": [{"role": "user", "content": "a b c"}]}


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


# ── the file ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_line_is_a_digest_and_what_its_key_may_ask(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(
        f"# the house\n{ONE.hex()}\n\n{TWO.hex().upper()}  name=kitchen requests_per_minute=60 tokens_per_minute=20000 concurrent=4 # x\n"
    )
    assert read_keys(file) == {ONE: KeyRules(), TWO: KeyRules("kitchen", 60, 20000, 4)}


@pytest.mark.parametrize("words", ["rpm=3", "requests_per_minute=0", "concurrent=-1", "name=", "concurrent", "concurrent=1.5", "kitchen"])
def test_a_word_that_says_nothing_is_named_and_no_digest(tmp_path: Path, words: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{ONE.hex()}\n{TWO.hex()} {words}\n")
    with pytest.raises(KeysError, match=f"line 2.*{words}") as refused:
        read_keys(file)
    assert TWO.hex() not in str(refused.value)


def test_an_edited_file_counts_and_a_broken_one_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{ONE.hex()}\n")
    keys = KeysFile(file, read_keys(file))
    assert set(keys.keys()) == {ONE}
    file.write_text(f"{ONE.hex()} concurrent=2\n{TWO.hex()}\n")
    assert keys.keys() == {ONE: KeyRules(concurrent=2), TWO: KeyRules()}
    file.write_text(f"{TWO.hex()} nonsense and more\n")
    for _ in range(3):
        assert set(keys.keys()) == {ONE, TWO}
    file.unlink()
    assert set(keys.keys()) == {ONE, TWO}
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    file.write_text(f"{TWO.hex()}\n")
    assert set(keys.keys()) == {TWO}


# ── the buckets ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def wait_s(allowances: Allowances, rules: KeyRules) -> int | None:
    """None: it may ask."""
    try:
        allowances.enter(ONE, {ONE: rules})
    except ApiError as refused:
        assert (refused.status_code, refused.code) == (429, "rate_limit_exceeded")
        return int((refused.headers or {})["Retry-After"])
    return None


def test_a_line_that_ends_after_its_key_was_struck_off_costs_nobody() -> None:
    allowances, other, rules = Allowances(Clock()), b"2" * 32, KeyRules(tokens_per_minute=10)
    assert allowances.overdrawn_s(ONE, {ONE: rules}) == 0.0
    allowances.enter(other, {other: rules})
    allowances.pay(ONE, 100)
    allowances.leave(other, 5)


@given(st.integers(1, 200), st.lists(st.floats(0, 30), min_size=1, max_size=300))
def test_no_minute_has_more_requests_than_a_full_bucket_and_what_flows_in(per_minute: int, pauses: list[float]) -> None:
    clock, rules, granted = Clock(), KeyRules(requests_per_minute=per_minute), 0
    allowances, began_s = Allowances(clock), 1000.0
    for pause in pauses:
        clock.now_s += pause
        wait = wait_s(allowances, rules)
        granted += wait is None
        if wait is None:
            allowances.leave(ONE, 0)
        else:
            assert wait <= 60 / per_minute + 1, "no longer than one request takes to flow in"
        assert granted <= per_minute + (clock.now_s - began_s) * per_minute / 60 + 1e-5


@given(st.integers(1, 100), st.lists(st.integers(0, 500), min_size=1, max_size=50))
def test_a_stated_wait_is_enough_and_tokens_are_bounded(per_minute: int, costs: list[int]) -> None:
    clock, rules, used = Clock(), KeyRules(tokens_per_minute=per_minute), 0
    allowances = Allowances(clock)
    for cost in costs:
        wait = wait_s(allowances, rules)
        if wait is not None:
            clock.now_s += wait
            assert wait_s(allowances, rules) is None
        assert used <= per_minute + (clock.now_s - 1000) * per_minute / 60 + 1e-5, "at the beginning of each request"
        allowances.leave(ONE, cost)
        used += cost


def test_requests_at_the_same_time_are_counted_through_a_change_of_rules() -> None:
    clock = Clock()
    allowances = Allowances(clock)
    assert [wait_s(allowances, KeyRules(concurrent=2)) for _ in range(3)] == [None, None, 1]
    assert wait_s(allowances, KeyRules(concurrent=3)) is None
    assert wait_s(allowances, KeyRules(concurrent=3)) == 1
    allowances.leave(ONE, 5)
    assert wait_s(allowances, KeyRules(concurrent=3)) is None


# ── the door ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_key_has_its_own_allowance_at_the_door(house: House, serve: Callable[[House], str]) -> None:
    house.keys = {ONE: KeyRules("kitchen", requests_per_minute=2), TWO: KeyRules(tokens_per_minute=1)}
    url = serve(house)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="one", max_retries=0) as one:
        for _ in range(2):
            one.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "hi"}])
        with pytest.raises(openai.RateLimitError, match="key kitchen has used its 2 requests a minute") as refused:
            one.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "hi"}])
    assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "requests")
    assert 1 <= int(refused.value.response.headers["Retry-After"]) <= 30
    assert httpx.get(f"{url}/v1/models", headers={"X-Api-Key": "one"}).status_code == 200, "looking costs nothing"
    two = {"X-Api-Key": "two"}
    assert httpx.post(f"{url}/v1/chat/completions", json={**ASK, "stream": True}, headers=two).status_code == 200
    for _ in range(20):  # the door counts when an answer has ended, a moment after its last byte
        answer = httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=two)
        if answer.status_code != 200:
            break
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "tokens"), "six were used, more than it has in a minute"
    assert int(answer.headers["Retry-After"]) > 200
    assert all(outcome.is_good for outcome in house.outcomes), "a key that asks too much is no failure of the node"


@pytest.mark.anyio
async def test_a_key_has_so_many_requests_at_the_same_time(house: House) -> None:
    house.keys = {ONE: KeyRules(concurrent=1)}
    waiting = {"model": "parrot", "messages": [{"role": "user", "content": "wait"}]}
    headers = {"Authorization": "Bearer one"}
    transport = httpx.ASGITransport(house.app().asgi)
    async with httpx.AsyncClient(transport=transport, base_url="http://node", headers=headers) as http:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: http.post("/v1/chat/completions", json=waiting))
            with anyio.fail_after(10):
                await house.text.started.wait()
            assert (await http.post("/v1/chat/completions", json=ASK)).status_code == 429
            tasks.cancel_scope.cancel()
        assert (await http.post("/v1/chat/completions", json=ASK)).status_code == 200
