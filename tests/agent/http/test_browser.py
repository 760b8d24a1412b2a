"""The page in a real browser, driven as a person would."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.http.collaborators import AttemptView, BuildView, EventView
from agent.http.keys import KeyRules
from tests.agent.http.browser import Browser, browser, missing
from tests.agent.http.conftest import House


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
def page(chromium: Browser, house: House, serve: Callable[[House], str]) -> Iterator[Browser]:
    chromium.open(serve(house) + "/")
    chromium.until(lambda: chromium.text("#node") == "spare-1", "the page does not name the node")
    chromium.errors()
    yield chromium
    chromium.open("about:blank")


def test_the_page_shows_the_node(page: Browser) -> None:
    assert page.text("#mode") == "active"
    assert page.text("#serving") == "Serving requests"
    assert page.text('[data-fact="Lease"]') == "73 s"
    assert page.text('[data-fact="Epoch"]') == "7"
    assert page.text('[data-fact="Device"]') == "CPU 31 % · GPU 62 % · 9.0 of 15.3 GB · 58 °C · 17.2 W · throttled"
    assert "parrot" in page.text("#models")
    assert "mean KL 0.004" in page.text("#models")
    assert "latency 31.5 ms · matched boxes 97.5 % · max score delta 1.5e-6" in page.text("#models")
    assert "315 MiB" in page.text("#workers")
    assert "SIGSEGV" in page.text("#events")
    assert page.run("return document.title") == "active · spare-1"
    assert page.errors() == []


def test_the_newest_event_is_seen_first_and_standby_that_serves_is_not_called_active(page: Browser, house: House) -> None:
    events = tuple(EventView(number, "x", "mode", "info", f"event {number}") for number in range(1, 30))
    house.node.now = replace(house.node.now, mode="standby", reason="contingent_lease", events=events)
    page.until(lambda: page.text("#events li").endswith("event 29"), "the newest event is not on top")
    assert page.text("#serving") == "Ready to serve"


def test_the_camera_is_live_and_counts(page: Browser, house: House) -> None:
    page.until(lambda: page.run("return document.querySelector('#picture').naturalWidth") == 64, "the camera's picture does not load")
    assert house.vision.watching == 1
    assert "parcel3in view · 120 counted of 121" in page.text("#counts")
    assert "12.1 frames/s" in page.text("#camera-figures")
    assert page.errors() == []


def test_the_chat_streams_an_answer_and_says_who_gave_it(page: Browser) -> None:
    page.type("#prompt", "Paris it is")
    page.click("#send")
    page.until(lambda: "answered by hotspare/spare-1" in page.text("#talk"), "nobody is named")
    assert page.text(".say.user") == "Paris it is"
    assert page.text(".say.node") == "Paris it is"
    assert page.run("return document.querySelector('#model').length") == 2
    assert page.errors() == []


def test_stop_ends_a_generation(page: Browser, house: House) -> None:
    page.type("#prompt", "please wait")
    page.click("#send")
    page.until(lambda: page.text(".say.node") == "please wait", "the text so far is not shown")
    page.click("#send")
    page.until(house.text.cancelled.is_set, "the generation goes on")
    page.until(lambda: page.text("#send") == "Send", "the button stays")


def test_a_refusal_tells_mode_and_reason(page: Browser, house: House) -> None:
    house.node.close()
    page.until(lambda: page.text("#mode") == "standby", "the mode is not renewed")
    assert page.text("#serving") == "Not serving requests"
    page.type("#prompt", "hello")
    page.click("#send")
    page.until(lambda: page.text(".refused") != "", "the refusal is not shown")
    assert "standby" in page.text(".refused")
    assert "when the primary fails · ask again in 12 s" in page.text(".refused")


def test_the_switch_of_the_primary(page: Browser, house: House) -> None:
    page.click("#primary")
    page.until(lambda: house.demo.on is False, "the switch does nothing")
    page.until(lambda: "Off" in page.text("#primary-words"), "the new state is not shown")
    page.click("#primary")
    page.until(lambda: house.demo.on, "the switch does not go back")


def test_a_build_is_watched_cancelled_and_tried_again(page: Browser, house: House) -> None:
    parrot, *others = house.node.now.models

    def show(build: BuildView | None, **changes: object) -> None:
        house.node.now = replace(house.node.now, models=(replace(parrot, build=build, **changes), *others))  # type: ignore[arg-type]

    show(BuildView("building", "convert", 0.4), is_current=False)
    page.until(lambda: "next engine: convert 40 %" in page.text("#models"), "the build is not shown")
    button = "return document.querySelector('#models button')"
    page.run("window.kept = document.querySelector('#models button')")
    show(BuildView("building", "verify", 0.9), is_current=False)
    page.until(lambda: "next engine: verify 90 %" in page.text("#models"), "the build stands still")
    assert page.run(f"{button} === window.kept"), "a button that is about to be pressed was replaced"
    page.click("#models button")
    page.until(lambda: house.foreman.cancelled == ["parrot"], "the build is not cancelled")
    show(BuildView("failed", message="fp16: boxes are lost", attempts=2), ladder=(AttemptView("fp16", "failed", "boxes are lost"),))
    page.until(lambda: "boxes are lost" in page.text("#models"), "the reason is not shown")
    page.click("#models button")
    page.until(lambda: house.foreman.orders == [("parrot", {})], "the build is not tried again")
    assert page.errors() == []


def test_a_model_that_sleeps_says_why(page: Browser, house: House) -> None:
    parrot, *others = house.node.now.models
    house.node.now = replace(house.node.now, models=(replace(parrot, asleep="memory"), *others))
    page.until(lambda: "Memory was short; the next request loads it." in page.text("#models"), "the reason is not shown")
    assert "asleep" in page.text("#models")
    house.node.now = replace(house.node.now, models=(parrot, *others))
    page.until(lambda: "asleep" not in page.text("#models"), "it is not awake")
    assert page.errors() == []


def test_words_from_outside_stay_words(page: Browser, house: House) -> None:
    evil = "<img src=x onerror=document.title='owned'>"
    house.node.now = replace(house.node.now, node=evil, events=(EventView(3, "x", "y", "info", evil),))
    page.until(lambda: evil in page.text("#events"), "the event is not shown as text")
    assert page.text("#node") == evil
    assert page.run("return document.querySelectorAll('main img').length") == 1


def test_with_keys_the_page_asks_for_one_and_shows_the_camera_all_the_same(chromium: Browser, serve: Callable[[House], str]) -> None:
    house = House(keys={hashlib.sha256(b"sesame").digest(): KeyRules()})
    chromium.open(serve(house) + "/")
    chromium.until(lambda: chromium.run("return document.querySelector('#key-dialog').open"), "the page does not ask for a key")
    chromium.type("#key", "sesame")
    chromium.click("#key-form button")
    chromium.until(lambda: chromium.text("#node") == "spare-1", "the key is not used")
    chromium.until(lambda: chromium.run("return document.querySelector('#picture').naturalWidth") == 64, "no picture with a key")
    chromium.run("sessionStorage.clear()")
    chromium.open("about:blank")


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_overflows(page: Browser, width: int, tmp_path: Path) -> None:
    page.emulate("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 700)
    try:
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        page.picture(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
    finally:
        page.emulate("Emulation.clearDeviceMetricsOverride")
