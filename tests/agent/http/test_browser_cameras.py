"""What the cameras saw, and drawing on the picture, in a real browser; tests/stories/test_zone.py does so with the whole product."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.http.keys import KeyRules
from tests.agent.http.browser import Browser, browser, missing
from tests.agent.http.conftest import House
from tests.agent.http.sightings import Desk, seeing_house


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
def house(tmp_path: Path) -> Iterator[House]:
    with seeing_house(tmp_path) as house:
        yield house


@pytest.fixture
def page(chromium: Browser, house: House, serve: Callable[[House], str]) -> Iterator[Browser]:
    chromium.open(serve(house) + "/")
    chromium.until(
        lambda: chromium.text("#node") == "spare-1" or chromium.run("return document.querySelector('#key-dialog').open"), "no page"
    )
    chromium.errors()
    yield chromium
    chromium.run("sessionStorage.clear()")
    chromium.open("about:blank")


def shown(page: Browser) -> list[str]:
    found: list[str] = page.run("return [...document.querySelectorAll('.sighting')].map((one) => one.dataset.event)")
    return found


def choose(page: Browser, css: str, value: str) -> None:
    page.run(
        "const one = document.querySelector(arguments[0]); one.value = arguments[1]; one.dispatchEvent(new Event('change'))", css, value
    )


def test_sightings_come_in_pages_and_are_filtered(page: Browser) -> None:
    page.until(lambda: shown(page) == [f"e{number}" for number in range(24, 12, -1)], "the first page is not shown")
    page.run("document.querySelector('#sightings-older').click()")
    page.until(lambda: len(shown(page)) == 24, "the second page is not shown")
    choose(page, "#filter-camera", "yard")
    page.until(lambda: shown(page) == ["e20", "e15", "e10", "e5", "e0"], "the camera is not chosen")
    choose(page, "#filter-label", "ball")
    page.until(lambda: shown(page) == ["e15", "e5"], "the class is not chosen")
    assert page.errors() == []


def test_one_is_opened_with_its_box(page: Browser) -> None:
    page.until(lambda: shown(page), "nothing is shown")
    page.run("document.querySelector('[data-event=e24]').click()")
    page.until(lambda: page.run("return document.querySelector('#sighting-media img')?.naturalWidth") == 64, "no picture")
    box = page.run(
        "const box = document.querySelector('#sighting rect'); return ['x', 'y', 'width', 'height'].map((name) => box.getAttribute(name))"
    )
    assert box == ["5", "6", "2", "2"]
    assert "crossed kerb forward" in page.text("#sighting-facts")


def test_with_a_key_the_pictures_come_too(house: House, chromium: Browser, serve: Callable[[House], str]) -> None:
    house.keys = {hashlib.sha256(b"sesame").digest(): KeyRules()}
    chromium.open(serve(house) + "/")
    chromium.until(lambda: chromium.run("return document.querySelector('#key-dialog').open"), "no key is asked for")
    chromium.type("#key", "sesame")
    chromium.click("#key-form button")
    loaded = "return document.querySelector('[data-event=e24] image')?.getAttribute('href') ?? ''"
    chromium.until(lambda: chromium.run(loaded).startswith("blob:"), "the snapshot is not fetched with the key")
    chromium.run("sessionStorage.clear()")
    chromium.open("about:blank")


def test_what_is_drawn_is_sent_and_a_refusal_is_shown(page: Browser, house: House) -> None:
    desk = house.cameras
    assert isinstance(desk, Desk)
    page.until(lambda: not page.run("return document.querySelector('#edit-shapes').hidden"), "nothing to edit")
    page.run("document.querySelector('.camera').scrollIntoView()")
    page.click("#edit-shapes")
    page.click("#draw-line")
    for x, y in ((0.4, 0.2), (0.6, 0.8)):
        page.press("#shapes", x, y)
    page.click("#draw-mask")
    for x, y in ((0.4, 0.3), (0.6, 0.3), (0.5, 0.6), (0.4, 0.3)):
        page.press("#shapes", x, y)
    page.run("const name = document.querySelector('#shape-name'); name.value = 'no/name'; name.dispatchEvent(new Event('input'))")
    page.click("#shape-save")
    page.until(lambda: "masks[0].name" in page.text("#shape-words"), "the refusal does not name the field")
    assert "lines" not in desk.wanted["belt"]
    page.run("const name = document.querySelector('#shape-name'); name.value = 'street'; name.dispatchEvent(new Event('input'))")
    page.click("#shape-save")
    page.until(lambda: page.run("return document.querySelector('#shape-editor').hidden"), "it is not saved")
    (mask,) = desk.wanted["belt"]["masks"]
    (line,) = desk.wanted["belt"]["lines"]
    assert (mask["name"], len(mask["points"]), line["name"]) == ("street", 3, "line 1")
    assert desk.wanted["belt"]["source"] == "rtsp://me:pass@host/x"
    page.click("#edit-shapes")
    page.click("#shape-reset")
    page.until(lambda: desk.was_reset == ["belt"], "the file does not count again")


def test_zones_loiter_by_class_and_settle_after_so_many_frames(page: Browser, house: House) -> None:
    desk = house.cameras
    assert isinstance(desk, Desk)
    points = [[0.1, 0.1], [0.9, 0.1], [0.9, 0.9]]
    desk.wanted["belt"] = {**desk.wanted["belt"], "zones": [{"name": "gate", "points": points, "loitering_s": {"person": 10}}]}
    page.until(lambda: page.run("return document.querySelector('#shapes').textContent").startswith("gate"), "the zone is not shown")
    page.click("#edit-shapes")
    page.click("#shape-list button")
    assert page.run("return document.querySelector('#shape-loitering').value") == "person 10"

    def enter(field: str, text: str) -> None:
        page.run(
            "const one = document.querySelector(arguments[0]); one.value = arguments[1]; one.dispatchEvent(new Event('input'))", field, text
        )

    enter("#shape-loitering", "person")
    page.click("#shape-save")
    assert page.run("return document.querySelector('#shape-loitering').matches(':invalid')")
    enter("#shape-loitering", "person 12.5, traffic light 60")
    enter("#shape-inertia", "7")
    page.click("#shape-save")
    page.until(lambda: page.run("return document.querySelector('#shape-editor').hidden"), "it is not saved")
    (zone,) = desk.wanted["belt"]["zones"]
    assert zone == {
        "name": "gate",
        "points": points,
        "inertia_frames": 7,
        "labels": [],
        "loitering_s": {"person": 12.5, "traffic light": 60},
    }


def test_a_camera_is_paused_and_resumed(page: Browser, house: House) -> None:
    desk = house.cameras
    assert isinstance(desk, Desk)
    page.until(lambda: not page.run("return document.querySelector('#pause').hidden"), "nothing to pause")
    page.click("#pause")
    page.until(lambda: page.text("#pause") == "Resume", "it is not paused")
    assert desk.wanted["belt"]["enabled"] is False
    page.click("#pause")
    page.until(lambda: page.text("#pause") == "Pause", "it is not resumed")
    assert desk.wanted["belt"]["enabled"] is True


def test_with_a_key_live_is_live(house: House, chromium: Browser, serve: Callable[[House], str]) -> None:
    """Twenty pictures a second come; a picture element could not have sent the key."""
    house.keys = {hashlib.sha256(b"sesame").digest(): KeyRules()}
    chromium.open(serve(house) + "/")
    chromium.until(lambda: chromium.run("return document.querySelector('#key-dialog').open"), "no key is asked for")
    chromium.run(
        "window.shown = new Set(); const picture = document.querySelector('#picture');"
        "picture.addEventListener('load', () => { if (picture.naturalWidth === 64) window.shown.add(picture.src); });"
    )
    chromium.type("#key", "sesame")
    chromium.click("#key-form button")
    chromium.until(lambda: house.vision.watching == 1, "the stream is not opened")
    chromium.until(lambda: chromium.run("return window.shown.size") > 10, "no pictures come")
    assert chromium.run("return [...window.shown].every((source) => source.startsWith('blob:'))")
    assert chromium.run("return !performance.getEntriesByType('resource').some((one) => one.name.includes('sesame'))")
    chromium.run("sessionStorage.clear()")
    chromium.open("about:blank")
    chromium.until(lambda: house.vision.watching == 0, "the stream goes on when nobody looks")
