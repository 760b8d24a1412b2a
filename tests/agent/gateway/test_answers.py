"""The answer cache over a real gateway, real files and a real Redis."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import redis.asyncio as redis

from agent.demo.programs import free_port
from agent.gateway import answers_redis
from agent.gateway.answers import AnswerCache, AnswerStore, CachePolicy
from agent.gateway.answers_redis import RedisAnswers
from agent.gateway.answers_sqlite import SqliteAnswers
from agent.gateway.cache_key import key_of, may_keep
from agent.gateway.primary import Primary
from agent.gateway.recent import MOST_USES, Found, Recent
from tests.agent.gateway import primaries
from tests.agent.gateway.conftest import LOCAL, House, Setup
from tests.agent.gateway.primaries import WORDS, Call, cut_at, status, stream_bytes, well

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]
ASKED: dict[str, Any] = {"model": "deepseek-chat", "temperature": 0, "messages": [{"role": "user", "content": "hi"}]}
CLOUD_TEXT, LOCAL_TEXT = "".join(WORDS), "".join(LOCAL)


@dataclass
class Clock:
    now_s: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Origins:
    primary: Primary

    def asked(self, model: str) -> Sequence[str]:
        return ["cloud"] if self.primary.may_ask() else ["cloud", "local"]

    def of(self, model: str, is_primary: bool) -> str | None:
        return "cloud" if is_primary else "local"


@dataclass
class Cached:
    """A setup with a cache around its gateway."""

    setup: Setup
    store: AnswerStore
    clock: Clock = field(default_factory=Clock)
    policy: CachePolicy = field(default_factory=CachePolicy)
    cache: AnswerCache | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[House]:
        def around(app: Any, primary: Primary) -> AnswerCache:
            self.cache = AnswerCache(app, self.store, self.policy, Origins(primary), self.clock)
            return self.cache

        self.setup.around = around
        async with self.setup.running(probes=False) as house:
            yield house


@pytest.fixture
async def cached(setup: Setup, tmp_path: Path) -> AsyncIterator[Cached]:
    clock = Clock()
    store = SqliteAnswers(tmp_path / "answers.sqlite", 1 << 20, 100, clock)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(store.run)
        yield Cached(setup, store, clock)
        tasks.cancel_scope.cancel()


async def ask(house: House, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    return await house.client.post("/v1/chat/completions", json={**ASKED, **more}, headers=headers or {})


async def until(holds: Callable[[], bool], what: str) -> None:
    with anyio.move_on_after(30.0):
        while True:
            if holds():
                return
            await anyio.sleep(0.01)
    raise AssertionError(what)


async def until_kept(cached: Cached, count: int = 1) -> None:
    await until(lambda: cached.cache is not None and cached.cache.counts.kept >= count, "an answer is kept")
    await anyio.sleep(0.05)  # the write follows


async def test_the_same_question_is_asked_once(cached: Cached) -> None:
    async with cached.running() as house:
        first = await ask(house)
        assert (first.headers["x-hotspare-cache"], first.headers["x-hotspare-backend"]) == ("miss", "primary")
        await until_kept(cached)
        second = await ask(house)
        assert (second.headers["x-hotspare-cache"], second.headers["x-hotspare-backend"]) == ("hit", "cache")
        assert second.json()["choices"] == first.json()["choices"]
        assert second.json()["usage"]["prompt_cache_hit_tokens"] == first.json()["usage"]["prompt_tokens"]
        assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 5
        assert len(cached.setup.cloud.calls) == 1
        await until(lambda: len(cached.setup.outcomes) == 2, "two outcomes")
        assert [(outcome.backend, outcome.cloud_calls) for outcome in cached.setup.outcomes] == [("primary", 1), ("cache", 0)]


async def test_a_kept_answer_is_given_as_a_stream_and_back(cached: Cached) -> None:
    async with cached.running() as house:
        await ask(house)
        await until_kept(cached)
        text, usage = "", None
        stream = await house.openai.chat.completions.create(
            **ASKED, stream=True, stream_options={"include_usage": True}, extra_headers={"authorization": ""}
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert text == CLOUD_TEXT
        assert usage is not None
        assert usage.completion_tokens == len(WORDS)
        assert len(cached.setup.cloud.calls) == 1
        other: dict[str, Any] = {"messages": [{"role": "user", "content": "other"}]}
        streamed = await ask(house, **other, stream=True)
        await until_kept(cached, 2)
        again = await ask(house, **other, stream=True)
        assert again.headers["x-hotspare-cache"] == "hit"
        assert again.content == streamed.content == b"".join(stream_bytes(model="deepseek-chat"))
        assert (await ask(house, **other)).headers["x-hotspare-cache"] == "miss", "its usage is not known, and nothing is made up"


@pytest.mark.parametrize(
    ("more", "headers"),
    [
        ({"temperature": 0.7}, {}),
        ({"temperature": None}, {}),
        ({"n": 2}, {}),
        ({}, {"cache-control": "no-store"}),
    ],
)
async def test_what_is_drawn_at_random_or_not_to_be_kept_is_asked_each_time(
    cached: Cached, more: dict[str, Any], headers: dict[str, str]
) -> None:
    async with cached.running() as house:
        for _ in range(2):
            assert "x-hotspare-cache" not in (await ask(house, headers, **more)).headers
        assert len(cached.setup.cloud.calls) == 2


async def test_no_cache_asks_anew_and_keeps_that(cached: Cached) -> None:
    async with cached.running() as house:
        await ask(house)
        await until_kept(cached)
        assert (await ask(house, {"cache-control": "no-cache"})).headers["x-hotspare-cache"] == "miss"
        await until_kept(cached, 2)
        assert (await ask(house)).headers["x-hotspare-cache"] == "hit"
        assert len(cached.setup.cloud.calls) == 2


async def test_one_keys_answers_are_not_anothers_unless_configured(cached: Cached) -> None:
    async with cached.running() as house:
        await ask(house, {"authorization": "Bearer one"})
        await until_kept(cached)
        assert (await ask(house, {"authorization": "Bearer two"})).headers["x-hotspare-cache"] == "miss"
        assert (await ask(house, {"authorization": "Bearer one"})).headers["x-hotspare-cache"] == "hit"
    cached.policy = CachePolicy(is_shared=True)
    async with cached.running() as house:
        await ask(house, {"authorization": "Bearer three"})
        await until_kept(cached)
        assert (await ask(house, {"authorization": "Bearer four"})).headers["x-hotspare-cache"] == "hit"


async def test_answers_grow_old(cached: Cached) -> None:
    async with cached.running() as house:
        await ask(house)
        await until_kept(cached)
        cached.clock.now_s += 3601
        assert (await ask(house)).headers["x-hotspare-cache"] == "miss"


@pytest.mark.parametrize("behave", [status(400), cut_at(600), status(503)], ids=["refused", "continued", "local"])
async def test_only_whole_answers_of_the_primary_are_kept_as_its_own(cached: Cached, behave: primaries.Behaviour) -> None:
    async with cached.running() as house:
        cached.setup.cloud.behave = behave
        await ask(house, stream=True)
        cached.setup.cloud.behave = well
        answer = await ask(house, stream=True)
        assert answer.headers["x-hotspare-cache"] == "miss"
        assert answer.content == b"".join(stream_bytes(model="deepseek-chat"))


async def test_in_an_outage_what_the_cloud_said_still_counts(cached: Cached) -> None:
    async with cached.running() as house:
        await ask(house)
        await until_kept(cached)
        cached.setup.cloud.behave = status(402)
        other: dict[str, Any] = {"messages": [{"role": "user", "content": "other"}]}
        assert (await ask(house, **other)).json()["choices"][0]["message"]["content"] == LOCAL_TEXT
        assert not house.primary.may_ask()
        known = await ask(house)
        assert (known.headers["x-hotspare-cache"], known.json()["choices"][0]["message"]["content"]) == ("hit", CLOUD_TEXT)
        await until_kept(cached, 2)
        assert (await ask(house, **other)).headers["x-hotspare-cache"] == "hit", "this node's own answer, while it answers"


async def test_equal_requests_in_flight_are_asked_once_and_outlive_the_first_client(cached: Cached) -> None:
    go_on = anyio.Event()

    async def slowly(call: Call) -> None:
        await call.begin_stream()
        events = stream_bytes(model="deepseek-chat")
        await call.part(b"".join(events[:3]))
        await go_on.wait()
        await call.part(b"".join(events[3:]))
        await call.end_stream()

    cached.setup.cloud.behave = slowly
    cached.setup.policy = cached.setup.policy.__class__("", cached.setup.policy.budgets.__class__())
    async with cached.running() as house:
        answers: list[httpx.Response] = []

        async def one() -> None:
            answers.append(await ask(house, stream=True))

        async with anyio.create_task_group() as tasks:
            async with house.client.stream("POST", "/v1/chat/completions", json={**ASKED, "stream": True}) as leader:
                assert leader.headers["x-hotspare-cache"] == "miss"
                for _ in range(5):
                    tasks.start_soon(one)
                with anyio.fail_after(30):
                    while "hotspare_inference_in_flight 6.0" not in (await house.client.get("/metrics")).text:  # noqa: ASYNC110
                        await anyio.sleep(0.02)
                await anyio.sleep(0.2)  # from the door to the flight they join
            go_on.set()  # the one who asked first has left
        assert {answer.headers["x-hotspare-cache"] for answer in answers} == {"shared"}
        assert {answer.content for answer in answers} == {b"".join(stream_bytes(model="deepseek-chat"))}
        assert len(cached.setup.cloud.calls) == 1


async def test_when_all_clients_have_left_the_primary_is_left_too(cached: Cached) -> None:
    cached.setup.cloud.behave = primaries.stall_after(2)
    cached.setup.policy = cached.setup.policy.__class__("", cached.setup.policy.budgets.__class__())
    async with cached.running() as house:
        async with house.client.stream("POST", "/v1/chat/completions", json={**ASKED, "stream": True}):
            pass
        with anyio.fail_after(5):
            await cached.setup.cloud.left.wait()


async def test_a_hit_takes_less_than_three_milliseconds(cached: Cached) -> None:
    async with cached.running() as house:
        await ask(house)
        await until_kept(cached)
        took_ms = []
        for _ in range(50):
            started_s = anyio.current_time()
            assert (await ask(house)).headers["x-hotspare-cache"] == "hit"
            took_ms.append(1000 * (anyio.current_time() - started_s))
        await until(lambda: len(cached.setup.outcomes) == 51, "outcomes")
        inside_ms = sorted(outcome.latency_ms for outcome in cached.setup.outcomes[1:])
        assert inside_ms[5] < 3.0, f"inside the node {inside_ms[25]:.2f} ms, over HTTP {sorted(took_ms)[25]:.2f} ms (medians)"


# ── the file ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_file_is_bounded_and_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    store = SqliteAnswers(tmp_path / "a.sqlite", 10_000, 5, Clock())
    for number in range(5):
        await store.put(str(number), b"x" * 100, 60)
    assert await store.get("0") == b"x" * 100
    await store.put("5", b"x" * 100, 60)
    assert await store.get("1") is None
    assert await store.get("0") is not None
    await store.put("big", b"x" * 1250, 60)
    for number in range(10, 18):
        await store.put(str(number), b"x" * 1250, 60)
    assert await store.get("big") is None
    again = SqliteAnswers(tmp_path / "a.sqlite", 10_000, 5, Clock())
    assert await again.get("17") == b"x" * 1250, "kept over a restart"


async def test_what_was_used_lately_needs_no_disk(tmp_path: Path) -> None:
    clock = Clock()
    store = SqliteAnswers(tmp_path / "a.sqlite", 1 << 20, 100, clock)
    await store.put("old", b"1", 60)
    await store.put("new", b"2", 60)
    again = SqliteAnswers(tmp_path / "a.sqlite", 1 << 20, 100, clock)
    assert await again.get("new") == b"2"
    with again._lock:  # the disk hangs
        assert await again.get("new") == b"2"
        assert await again.get("old") is None
        clock.now_s += 61
        assert await again.get("new") is None
    clock.now_s -= 61
    assert await again.get("old") == b"1"
    await again.put("new", b"3", 60)
    assert await again.get("new") == b"3"


async def test_uses_in_memory_are_written_down_at_the_end(tmp_path: Path) -> None:
    store = SqliteAnswers(tmp_path / "a.sqlite", 1 << 20, 3, Clock())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(store.run)
        for key in "abc":
            await store.put(key, key.encode(), 60)
        for key in "cba":
            assert await store.get(key) == key.encode()
        tasks.cancel_scope.cancel()
    again = SqliteAnswers(tmp_path / "a.sqlite", 1 << 20, 3, Clock())
    await again.put("d", b"d", 60)
    assert [await again.get(key) for key in "abcd"] == [b"a", b"b", None, b"d"]


def test_memory_for_answers_is_bounded() -> None:
    recent = Recent(100)
    for key in "abc":
        recent.put(key, Found(10.0, b"x" * 40))
    assert [recent.get(key, 0.0) is not None for key in "abc"] == [False, True, True]
    recent.put("b", Found(10.0, b"y" * 10))
    recent.put("d", Found(10.0, b"z" * 50))
    assert [recent.get(key, 0.0) is not None for key in "bcd"] == [True, True, True]
    recent.put("e", Found(10.0, b"x" * 51))
    assert recent.get("e", 0.0) is None, "it would have driven the others out"
    assert recent.get("d", 10.0) is None, "its time is over"
    assert recent.taken() == ["a", "b", "c", "d", "e"]
    for number in range(5000):
        recent.put(str(number), Found(10.0, b""))
    assert len(recent.taken()) == MOST_USES


async def test_a_broken_file_is_begun_anew_at_the_start_and_in_the_middle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.sqlite"
    file.write_bytes(b"no database at all" * 1000)
    store = SqliteAnswers(file, 1 << 20, 1000, Clock())
    await store.put("a", b"1", 60)
    assert await store.get("a") == b"1"
    for number in range(200):
        await store.put(f"key {number}", b"x" * 4000, 60)
    other = SqliteAnswers(file, 1 << 20, 1000, Clock())
    await store._do(store._close, 1.0)
    caplog.clear()
    data = bytearray(file.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    file.write_bytes(bytes(data))
    for number in range(20):
        await other.get(f"key {number}")
        await other.put(f"key {number}", b"new", 60)
    assert await other.get("key 7") == b"new"
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert file.with_name("a.sqlite.broken").exists()


async def test_a_folder_that_takes_no_file_costs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = SqliteAnswers(tmp_path / "file" / "a.sqlite", 1 << 20, 1000, Clock())
    for _ in range(5):
        await store.put("a", b"1", 60)
        assert await store.get("a") is None
    assert len(caplog.records) == 1


# ── Redis ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def redis_server(port: int) -> Iterator[subprocess.Popen[bytes]]:
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait(5)


async def test_redis_may_die_and_come_back_during_load(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    store = RedisAnswers(f"redis://127.0.0.1:{port}", 0.05)
    cached = Cached(setup, store)
    slowest_ms = 0.0

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(store.run)
        async with cached.running() as house:

            async def is_hit(word: str) -> bool:
                nonlocal slowest_ms
                started_s = anyio.current_time()
                answer = await ask(house, messages=[{"role": "user", "content": word}])
                assert answer.json()["choices"][0]["message"]["content"] == CLOUD_TEXT
                slowest_ms = max(slowest_ms, 1000 * (anyio.current_time() - started_s))
                return answer.headers["x-hotspare-cache"] == "hit"

            async def until_hit() -> None:
                with anyio.fail_after(15):
                    while True:
                        if await is_hit("again"):
                            return
                        await anyio.sleep(0.02)

            with redis_server(port):
                await until_hit()
            caplog.clear()
            slowest_ms = 0.0
            for number in range(40):
                assert not await is_hit(f"dead {number}")
            warnings = [record for record in caplog.records if record.name == "agent.gateway.answers_redis"]
            assert len(warnings) == 1, [record.getMessage() for record in warnings]
            assert slowest_ms < 500
            with redis_server(port) as server:
                await until_hit()
                server.send_signal(19)  # SIGSTOP: connected, and silent
                caplog.clear()
                for number in range(20):
                    assert not await is_hit(f"silent {number}")
                assert len([record for record in caplog.records if record.name == "agent.gateway.answers_redis"]) == 1
                server.send_signal(18)
                await until_hit()
        tasks.cancel_scope.cancel()


async def load(house: House, is_over: anyio.Event, clients: int = 16) -> list[float]:
    """So many clients ask until it is over, some of it again and again; the seconds that each answer took. None may be wrong."""
    took_s: list[float] = []

    async def one(client: int) -> None:
        number = 0
        while not is_over.is_set():
            number += 1
            started_s = anyio.current_time()
            answer = await ask(house, messages=[{"role": "user", "content": f"{number % 5} {client % 4}"}])
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["content"] == CLOUD_TEXT
            took_s.append(anyio.current_time() - started_s)

    async with anyio.create_task_group() as tasks:
        for client in range(clients):
            tasks.start_soon(one, client)
    return took_s


async def test_sixteen_clients_do_not_notice_that_redis_dies_and_returns(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    port, deadline_s, slack_s = free_port(), 0.05, 5.0
    store = RedisAnswers(f"redis://127.0.0.1:{port}", deadline_s)
    cached, is_over = Cached(setup, store), anyio.Event()
    took_s: list[float] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(store.run)
        async with cached.running() as house:
            assert cached.cache is not None
            counts = cached.cache.counts

            async def clients() -> None:
                took_s.extend(await load(house, is_over))

            async def until_hits() -> None:
                before = counts.hits
                await until(lambda: counts.hits > before + 20, "answers out of Redis")

            async def until_misses() -> None:
                before = counts.misses
                await until(lambda: counts.misses > before + 20, "answers without it")

            async with anyio.create_task_group() as asking:
                asking.start_soon(clients)
                for _ in range(2):
                    with redis_server(port):
                        await until_hits()
                    await until_misses()
                with redis_server(port) as server:
                    await until_hits()
                    server.send_signal(19)  # SIGSTOP
                    await until_misses()
                    server.send_signal(18)
                    await until_hits()
                    is_over.set()
        tasks.cancel_scope.cancel()
    assert sorted(took_s)[9 * len(took_s) // 10] < deadline_s + slack_s, "a busy machine may hold some of them up"


async def test_a_full_redis_is_read_from_and_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    store = RedisAnswers(f"redis://127.0.0.1:{port}", 1.0)
    caplog.set_level(logging.INFO)

    def told() -> list[str]:
        return [record.levelname for record in caplog.records if record.name == "agent.gateway.answers_redis"]

    async def until_kept() -> None:
        with anyio.fail_after(30):
            while True:
                await store.put("first", b"1", 60)
                if await store.get("first") == b"1":
                    return
                await anyio.sleep(0.05)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(store.run)
        with redis_server(port):
            await until_kept()
            caplog.clear()
            client = redis.Redis.from_url(f"redis://127.0.0.1:{port}")
            await client.config_set("maxmemory", "1")
            monkeypatch.setattr(answers_redis, "FULL_S", 0.0)
            for number in range(10):
                await store.put(f"{number}", b"x" * 1000, 60)
                assert await store.get("first") == b"1"
            assert told() == ["WARNING"]
            await client.config_set("maxmemory", "0")
            for number in range(3):
                await store.put(f"{number}", b"x", 60)
            assert await store.get("2") == b"x"
            assert told() == ["WARNING", "INFO"]
            await client.aclose()
        tasks.cancel_scope.cancel()


async def test_a_file_that_breaks_under_a_running_gateway_costs_hits_and_no_answer(cached: Cached, tmp_path: Path) -> None:
    """While it runs, and after the next start. What SQLite has in memory may hide the damage; what it finds is set aside, as above."""

    async def until_more(break_it: bool) -> None:
        assert cached.cache is not None
        counts = cached.cache.counts
        await until(lambda: counts.hits > 20, "answers out of the file")
        if not break_it:
            return
        for name in ("answers.sqlite", "answers.sqlite-wal"):
            if (tmp_path / name).exists():
                with (tmp_path / name).open("r+b") as stream:
                    stream.write(b"no database " * 20_000)
        seen = counts.hits + counts.misses + counts.shared
        await until(lambda: counts.hits + counts.misses + counts.shared > seen + 40, "answers with a broken file")

    for is_first in (True, False):
        is_over = anyio.Event()
        async with cached.running() as house, anyio.create_task_group() as asking:
            asking.start_soon(load, house, is_over, 4)
            await until_more(is_first)
            is_over.set()
        cached.store = SqliteAnswers(tmp_path / "answers.sqlite", 1 << 20, 100, cached.clock)


# ── the key ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

CHANGES: list[dict[str, Any]] = [
    {"model": "other"}, {"temperature": 0.5}, {"seed": 1}, {"max_tokens": 5}, {"stop": "x"}, {"tools": [{"type": "function"}]},
    {"response_format": {"type": "json_object"}}, {"logprobs": True}, {"logit_bias": {"5": 1}}, {"user": "a"}, {"top_p": 0.5},
    {"messages": [{"role": "user", "content": "hi "}]}, {"messages": [{"role": "system", "content": "hi"}]}, {"unheard_of": 1},
]  # fmt: skip


def test_everything_that_changes_an_answer_is_in_the_key() -> None:
    def key(*places: str, **changes: Any) -> str:
        origin, tenant, path, query = places or ("o", "t", "/v1/chat/completions", "")
        return key_of(origin, tenant, path, query, {**ASKED, **changes})

    keys = [key(), *(key(**change) for change in CHANGES)]
    keys += [key("p", "t", "/v1/chat/completions", ""), key("o", "u", "/v1/chat/completions", "")]
    keys += [key("o", "t", "/v1/completions", ""), key("o", "t", "/v1/chat/completions", "a=1")]
    assert len(set(keys)) == len(keys)
    same = [key(stream=True), key(temperature=0.0), key(n=1), key(seed=None), key(response_format={"type": "text"})]
    assert {*same, key("o", "t", "/chat/completions", "")} == {key()}


def test_only_what_would_be_answered_so_again_is_kept() -> None:
    chat = "/v1/chat/completions"
    assert may_keep(chat, ASKED, keeps_all=False)
    assert may_keep(chat, {**ASKED, "temperature": 1, "seed": 5}, keeps_all=False)
    assert not may_keep(chat, {**ASKED, "temperature": 1}, keeps_all=False)
    assert may_keep(chat, {**ASKED, "temperature": 1}, keeps_all=True)
    assert not may_keep(chat, {**ASKED, "temperature": False}, keeps_all=False)
    assert not may_keep(chat, {**ASKED, "n": 2}, keeps_all=True)
    assert may_keep("/v1/embeddings", {"model": "m", "input": "x"}, keeps_all=False)
