"""A person draws a zone on the live picture, in a real browser, and things that pass it become events that say so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread

from tests.agent.http.browser import Browser, browser, missing
from tests.stories.house import House, until

RECORD = {"enabled": True, "pre_s": 0.5, "post_s": 0.5, "labels": ["ball"]}
BELT = {"id": "belt", "source": "conveyor:?seed=3", "model": "conveyor-detr", "fps": 8.0, "record": RECORD}


def draw_a_gate(page: Browser, url: str) -> None:
    page.open(url)
    page.until(lambda: page.run("return document.querySelector('#picture').naturalWidth") == 640, "no live picture", 20)
    page.until(lambda: not page.run("return document.querySelector('#edit-shapes').hidden"), "nothing to edit")
    page.run("document.querySelector('.camera').scrollIntoView()")
    page.click("#edit-shapes")
    page.click("#draw-zone")
    for x, y in ((0.3, 0.1), (0.7, 0.1), (0.7, 0.95), (0.3, 0.95), (0.3, 0.1)):
        page.press("#shapes", x, y)
    page.until(lambda: page.text("#shape-list") == "zone 1", "the zone is not closed")
    page.run("document.querySelector('#shape-name').value = ''")
    page.type("#shape-name", "gate")
    page.click("#shape-save")
    page.until(lambda: page.run("return document.querySelector('#shape-editor').hidden"), f"not saved: {page.text('#shape-words')}")


def see_it_fire(page: Browser) -> None:
    page.until(lambda: "gate" in page.text("#sightings .tag"), "no event of the zone on the page", 15)
    page.until(lambda: page.run("return document.querySelector('#shapes .occupied') !== null"), "the zone is not shown as occupied")
    page.click("#sightings .sighting")
    page.until(lambda: page.run("return document.querySelector('#sighting-media img')?.naturalWidth") == 640, "no snapshot")
    assert page.run("return document.querySelector('#sighting rect') !== null")
    page.click("#sighting-close")


def play(page: Browser, event: str) -> None:
    page.until(lambda: page.run("return document.querySelector(arguments[0]) !== null", f"[data-event='{event}'] .play"), "no clip offered")
    page.run("document.querySelector(arguments[0]).click()", f"[data-event='{event}']")
    page.until(lambda: page.run("return document.querySelector('#sighting video')?.videoWidth") == 640, "the clip does not play")


@pytest.mark.anyio
async def test_a_zone_drawn_in_the_browser_fires(tmp_path: Path) -> None:
    if absent := missing():
        reason = f"no {' and no '.join(absent)}: install chromium and chromium-driver to test the page"
        if os.environ.get("HOTSPARE_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    house = House(tmp_path)
    settings = house.node_settings("spare-1", models={"serve": []}, worker={"threads": 1})
    settings["cameras"] = [BELT]
    async with house.node(settings) as node:
        await node.until_serving("conveyor-detr")
        (tmp_path / "profile").mkdir()
        with browser(tmp_path / "profile") as page:
            await to_thread.run_sync(draw_a_gate, page, f"http://127.0.0.1:{settings['http']['port']}/")
            told = (await node.client.get("/cameras/belt")).json()
            (zone,) = told["settings"]["zones"]
            assert (zone["name"], told["origin"], told["connections"]) == ("gate", "order", 1)  # the camera itself was not touched
            flat = [value for point in zone["points"] for value in point]
            assert flat == pytest.approx([0.3, 0.1, 0.7, 0.1, 0.7, 0.95, 0.3, 0.95], abs=0.02)

            async def fired() -> list[dict[str, Any]]:
                page_of_events = (await node.client.get("/events", params={"zone": "gate"})).json()
                return [event for event in page_of_events["data"] if event["state"] == "ended"]

            event, *_ = await until(fired, 20.0, "an object went through the zone")
            assert (event["camera"], event["zones"], event["ended_by"]) == ("belt", ["gate"], "object")
            assert event["dwell_s"]["gate"] > 0.3
            jpeg = await node.client.get(event["snapshot"])
            assert (jpeg.status_code, jpeg.content[:2]) == (200, b"\xff\xd8")
            await to_thread.run_sync(see_it_fire, page)

            async def filmed() -> list[str]:
                events = (await node.client.get("/events", params={"label": "ball", "limit": 12})).json()["data"]
                return [event["clip"] for event in events if event["clip"]]

            clip, *_ = await until(filmed, 20.0, "a clip of a ball is complete")
            part = await node.client.get(clip, headers={"Range": "bytes=4-7"})
            assert (part.status_code, part.content) == (206, b"ftyp")  # ISO 14496-12
            await to_thread.run_sync(play, page, clip.split("/")[2])
            assert page.errors() == []
