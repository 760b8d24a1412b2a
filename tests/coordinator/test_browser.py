"""The fleet's page in a real browser, over a real coordinator with a real broker and nodes, driven as an operator would."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from anyio import from_thread, to_thread

from agent.gateway.probe import Probe
from agent.protocol.messages import Event, Hardware, Meta, ModelState, PipelineState, State
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import wire_now
from tests.agent.http.browser import Browser, browser, missing
from tests.agent.link.broker import Mosquitto, running_mosquitto
from tests.coordinator.fleet import Coordinator, coordinator_settings, fleet_node, running_coordinator, served, until
from tests.coordinator.test_http import offline

pytestmark = pytest.mark.anyio

CAMERA_STATES: tuple[Literal["running", "starting", "stopped", "failed", "paused"], ...] = (
    "running",
    "starting",
    "stopped",
    "failed",
    "paused",
)
PATIENCE_S = 60.0
EVIL = "<img src=x onerror=document.title='owned'>"
FIRST_ROW = "#nodes tr:first-child"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if absent := missing():
        reason = f"no {' and no '.join(absent)}: install chromium and chromium-driver to test the page"
        if os.environ.get("HOTSPARE_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(chromium: Browser) -> Iterator[Browser]:
    chromium.errors()
    yield chromium
    chromium.open("about:blank")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path / "broker") as started:
        yield started


def row(page: Browser, node: str) -> str:
    return page.text(f'#nodes tr[data-node="{node}"]')


async def test_nodes_appear_one_dies_and_one_is_drained_by_hand(page: Browser, broker: Mosquitto, tmp_path: Path) -> None:
    broken = ModelState(name="tiny", status="failed", task="generation", message=EVIL)
    async with (
        running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator,
        served(coordinator) as url,
        fleet_node(broker, tmp_path / "a", "edge-a") as serving,
        fleet_node(broker, tmp_path / "b", "edge-b", agent=EVIL) as dying,
    ):
        await until(lambda: serving.mode == dying.mode == "active")

        def look() -> None:
            page.open(url)
            page.until(lambda: "active" in row(page, "edge-a") and "active" in row(page, "edge-b"), "no two nodes serve", PATIENCE_S)
            assert page.text("#primary") == "The primary is down"
            page.until(lambda: page.text("#badge") == "primary down" and "ConnectError" in page.text("#past-words"), "no past", PATIENCE_S)
            page.until(lambda: "sync" in page.text("#events"), "no events", PATIENCE_S)
            assert EVIL in row(page, "edge-b"), "the agent's version is not shown as the text that it is"
            assert page.text(f"{FIRST_ROW} .name") == "edge-a"
            from_thread.run_sync(dying.lose)
            page.until(lambda: page.text(f"{FIRST_ROW} .name") == "edge-b", "the dead node does not move to the top", PATIENCE_S)
            assert "lost" in page.text(FIRST_ROW) or "silent" in page.text(FIRST_ROW)
            page.type("#filter", "edge-a")
            page.until(lambda: page.text("#nodes .name") == "edge-a" and row(page, "edge-b") == "", "the filter does not filter")

        await to_thread.run_sync(look)

        def drain() -> None:
            page.click('#nodes tr[data-node="edge-a"] .name')
            page.until(lambda: "Drain" in page.text("#node-actions"), "no orders are offered", PATIENCE_S)
            assert "Restart" not in page.text("#node-actions"), "this node does not know agent.restart"
            page.click("#node-actions [data-op=drain]")
            page.click("#confirm-form button[value=no]")
            assert from_thread.run_sync(coordinator.statuses, "drain") == []
            page.click("#node-actions [data-op=drain]")
            assert page.text("#confirm-title") == "Drain edge-a?"
            page.click("#confirm-yes")
            page.until(lambda: "succeeded" in page.text("#node-order"), "the order does not end", PATIENCE_S)
            page.until(lambda: "drain" in page.text("#node-parts") and "drained" in page.text("#node-troubles"), "not told", PATIENCE_S)
            page.click("#node-close")
            page.until(lambda: "drained" in row(page, "edge-a"), "the row does not say so", PATIENCE_S)

        await to_thread.run_sync(drain)
        assert coordinator.statuses("drain") == ["succeeded"]

        async with fleet_node(broker, tmp_path / "c", "edge-c", models=(broken,)):

            def distrust() -> None:
                page.run(
                    "document.querySelector('#filter').value = ''; document.querySelector('#filter').dispatchEvent(new Event('input'))"
                )
                page.until(lambda: f"model tiny failed: {EVIL}" in row(page, "edge-c"), "the model's words are not shown", PATIENCE_S)
                page.click('#nodes tr[data-node="edge-c"] .name')
                page.until(lambda: EVIL in page.text("#node-parts"), "no details", PATIENCE_S)
                assert page.run("return document.querySelectorAll('main img, dialog img').length") == 0
                assert "owned" not in page.run("return document.title")
                assert page.errors() == []

            await to_thread.run_sync(distrust)


async def test_it_asks_for_the_token_until_it_is_the_right_one(page: Browser, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("s3cret\n")
    async with offline(tmp_path) as coordinator, served(coordinator, token_file) as url:

        def unlock() -> None:
            asks = "return document.querySelector('#key-dialog').open"
            page.open(url)
            page.until(lambda: page.run(asks), "no token is asked for", PATIENCE_S)
            assert row(page, "edge-a") == ""
            page.type("#key", "wrong")
            page.click("#key-form button")
            page.until(lambda: page.run(asks) and "does not take" in page.text("#key-words"), "a wrong one is taken", PATIENCE_S)
            page.type("#key", "s3cret")
            page.click("#key-form button")
            page.until(lambda: row(page, "edge-a") != "", "the right one is not taken", PATIENCE_S)
            assert not page.run(asks)
            assert "s3cret" not in page.run("return location.href") and page.run("return localStorage.length") == 0
            page.run("sessionStorage.setItem('hotspare-key', 'stale')")
            page.until(lambda: page.run(asks), "401 does not bring the question back", PATIENCE_S)
            page.run("sessionStorage.clear()")

        await to_thread.run_sync(unlock)


async def test_it_says_when_the_coordinator_does_not_answer(page: Browser, tmp_path: Path) -> None:
    async with offline(tmp_path) as coordinator:
        async with served(coordinator) as url:

            def see() -> None:
                page.open(url)
                page.until(lambda: row(page, "edge-a") != "", "no node", PATIENCE_S)

            await to_thread.run_sync(see)

        def miss() -> None:
            page.until(lambda: "does not answer" in page.text("#banner"), "nothing is said", PATIENCE_S)
            assert not page.run("return document.querySelector('#banner').hidden")
            assert row(page, "edge-a") != "", "what was known is gone"

        await to_thread.run_sync(miss)


async def test_older_events_come_page_by_page(page: Browser, tmp_path: Path) -> None:
    async with offline(tmp_path) as coordinator, served(coordinator) as url:
        tell(coordinator, 1, 121)

        def leaf() -> None:
            count = "return document.querySelectorAll('#events li').length"
            page.open(url)
            page.until(lambda: page.run(count) == 50 and "event 120" in page.text("#events li"), "not the newest fifty", PATIENCE_S)
            for shown in (100, 120):
                page.click("#events-older")
                page.until(lambda shown=shown: page.run(count) == shown, f"not {shown}", PATIENCE_S)  # type: ignore[misc]
            assert page.run("return document.querySelector('#events-older').hidden")
            assert page.text("#events li:last-child").endswith("event 1")
            from_thread.run_sync(tell, coordinator, 121, 123)
            page.until(lambda: "event 122" in page.text("#events li"), "the newest are not on top", PATIENCE_S)
            assert page.run(count) == 122

        await to_thread.run_sync(leaf)


def tell(coordinator: Coordinator, first: int, end: int) -> None:
    for number in range(first, end):
        data = {"message": f"event {number}"}
        coordinator.registry.add_event(
            Event(id=new_ulid(), node="edge-a", event_class="thermal", severity="warning", ts=wire_now(), mono=1.0, data=dict(data))
        )


@pytest.mark.parametrize("width", [390, 768, 1280])
async def test_nothing_overflows(page: Browser, tmp_path: Path, width: int) -> None:
    async with offline(tmp_path) as coordinator, served(coordinator) as url:
        models = tuple(ModelState(name=f"{'long' * 15}-{n}", status="failed", message="m" * 500) for n in range(9))
        pipelines = tuple(PipelineState(id=f"gate-{n}", status=status, message="p" * 500) for n, status in enumerate(CAMERA_STATES))
        coordinator.control.primary.last_probe = Probe(False, 5.0, "x" * 500)
        coordinator.control.problems.note("nginx", "y" * 500)
        store = coordinator.registry.store
        store(
            "meta",
            Meta(
                node="edge-a",
                boot="b",
                agent="1" * 128,
                ops=("ping", "drain", "agent.restart"),
                hw=Hardware(module="M" * 128, mem_mb=64_000),
            ),
        )
        store("state", State(node="edge-a", boot="b", seq=1, mode="standby", epoch=4, models=models, pipelines=pipelines))

        def measure() -> None:
            page.emulate("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 700)
            try:
                page.open(url)
                page.until(lambda: row(page, "edge-a") != "", "no node", PATIENCE_S)
                assert page.run("return document.documentElement.scrollWidth <= innerWidth")
                page.click("#nodes .name")
                page.until(lambda: "Orders" in page.text("#node-parts"), "no details", PATIENCE_S)
                assert page.text("#node-actions") == "DrainRestartPing", "what this node does not know is offered, or what it knows is not"
                assert page.run("return document.querySelector('#node-dialog').scrollWidth <= innerWidth")
            finally:
                page.emulate("Emulation.clearDeviceMetricsOverride")

        await to_thread.run_sync(measure)
