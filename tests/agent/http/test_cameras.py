"""Cameras and what they saw over HTTP: pages, files in parts, orders and their refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from agent.http.keys import KeyRules
from tests.agent.http.conftest import House
from tests.agent.http.fakes import JPEG
from tests.agent.http.sightings import CLIP, NOON, seeing_house

pytestmark = pytest.mark.anyio


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with seeing_house(tmp_path) as house:
        yield house


async def test_events_come_in_pages_newest_first(client: httpx.AsyncClient) -> None:
    seen: list[str] = []
    cursor = None
    while True:
        page = (await client.get("/events", params={"limit": 10, **({"cursor": cursor} if cursor else {})})).json()
        seen += [event["id"] for event in page["data"]]
        if not (cursor := page["next"]):
            break
    assert seen == [f"e{number}" for number in reversed(range(25))]
    first = (await client.get("/events?limit=1")).json()["data"][0]
    assert first == {
        "id": "e24", "object": "event", "camera": "belt", "label": "parcel", "state": "ended", "began_at": "2026-11-24T06:24:00.000Z",
        "ended_at": "2026-11-24T06:24:05.000Z", "ended_by": "object", "seen_for_s": 5.0, "score": 0.9, "box": [1, 2, 3, 4],
        "snapshot_box": [5, 6, 7, 8], "width": 64, "height": 48, "zones": ["gate"], "dwell_s": {"gate": 2.5}, "loitering": [],
        "crossed": [{"line": "kerb", "direction": "forward"}], "snapshot": "/events/e24/snapshot.jpg", "clip": "/events/e24/clip.mp4",
        "clip_is_coming": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/cameras/yard/events", ["e20", "e15", "e10", "e5", "e0"]),
        ("/events?camera=yard&label=ball", ["e15", "e5"]),
        ("/events?zone=gate&limit=3", ["e24", "e21", "e18"]),
        ("/events?since=2026-11-24T06:23:00Z", ["e24", "e23"]),
        (f"/events?since={NOON + 120}&until={NOON + 240}", ["e3", "e2"]),
        ("/cameras/gone/events", []),
    ],
)
async def test_events_are_filtered(client: httpx.AsyncClient, path: str, expected: list[str]) -> None:
    answer = await client.get(path)
    assert [event["id"] for event in answer.json()["data"]] == expected


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("cursor=xyz", "cursor"),
        ("cursor=ZS0x", "cursor"),
        ("since=yesterday", "since"),
        ("until=1e300", "until"),
        ("limit=0", "limit"),
        ("limit=9999", "limit"),
    ],
)
async def test_what_cannot_be_asked_is_refused_by_name(client: httpx.AsyncClient, path: str, param: str) -> None:
    answer = await client.get(f"/events?{path}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_a_clip_comes_whole_or_in_parts(client: httpx.AsyncClient) -> None:
    whole = await client.get("/events/e24/clip.mp4")
    assert (whole.status_code, whole.headers["content-type"], whole.headers["accept-ranges"]) == (200, "video/mp4", "bytes")
    assert whole.content == CLIP
    part = await client.get("/events/e24/clip.mp4", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.headers["content-range"], part.content) == (206, f"bytes 100-199/{len(CLIP)}", CLIP[100:200])
    tail = await client.get("/events/e24/clip.mp4", headers={"Range": "bytes=-10"})
    assert (tail.status_code, tail.content) == (206, CLIP[-10:])
    beyond = await client.get("/events/e24/clip.mp4", headers={"Range": "bytes=999999-"})
    assert beyond.status_code == 416
    picture = await client.get("/events/e24/snapshot.jpg")
    assert (picture.status_code, picture.headers["content-type"], picture.content) == (200, "image/jpeg", JPEG)


async def test_files_that_are_not_there_are_not_found(client: httpx.AsyncClient) -> None:
    for path in (
        "/events/nobody",
        "/events/e23/clip.mp4",
        "/events/e7/snapshot.jpg",
        "/events/..%2f..%2fetc/clip.mp4",
        "/events/.x/clip.mp4",
    ):
        answer = await client.get(path)
        assert answer.status_code in (400, 404), path
        assert "message" in answer.json()["error"]


async def test_a_camera_tells_how_it_is_and_how_it_was_told_to_be(client: httpx.AsyncClient) -> None:
    camera = (await client.get("/cameras/belt")).json()
    assert camera["health"] == "belt: 12.0 frames/s"
    assert camera["settings"] == {"source": "rtsp://…@host/x", "model": "boxes"}
    assert camera["origin"] == "order"
    assert (await client.get("/cameras/nobody")).status_code == 404


async def test_orders_are_taken_refused_and_taken_back(client: httpx.AsyncClient, house: House) -> None:
    zone = {"name": "gate", "points": [[0, 0], [1, 0], [1, 1]]}
    answer = await client.patch("/cameras/belt", json={"zones": [zone], "fps": 4})
    assert answer.status_code == 200
    assert answer.json()["settings"]["zones"] == [zone]
    answer = await client.patch("/cameras/belt", json={"zones": [{**zone, "points": [[0, 0], [1, 0], [1, 3]]}]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "zones[0].points[2][1]")
    answer = await client.put("/cameras/slow", json={"source": "conveyor:", "model": "boxes"})
    assert (answer.status_code, answer.json()["state"]) == (202, "starting")
    answer = await client.put("/cameras/full", json={"source": "conveyor:", "model": "boxes"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "no_space")
    assert (await client.put("/cameras/Bad%20Name", json={"source": "conveyor:", "model": "boxes"})).status_code == 400
    assert (await client.put("/cameras/x", json=[1])).status_code == 400
    for body in ('{"fps": NaN}', '{"remarks": Infinity}', '{"a": ' * 900 + "1" + "}" * 900, '{"remarks": "\\ud800"}', "", "{"):
        answer = await client.patch("/cameras/belt", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400), (body[:40], answer.text)
    assert (await client.delete("/cameras/belt/changes")).json()["changed"] is True
    assert (await client.delete("/cameras/belt")).json()["deleted"] is True
    assert (await client.delete("/cameras/belt")).status_code == 404


async def test_without_keys_orders_are_taken_from_this_machine_only_and_with_keys_from_their_holders(house: House) -> None:
    async def patch(house: House, address: str, **headers: str) -> int:
        transport = httpx.ASGITransport(house.app().asgi, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://node") as asking:
            return (await asking.patch("/cameras/belt", json={"fps": 3}, headers=headers)).status_code

    assert await patch(house, "10.0.0.9") == 403
    assert await patch(house, "127.0.0.1", forwarded="for=10.0.0.9") == 403
    assert await patch(house, "127.0.0.1") == 200
    house.keys = {hashlib.sha256(b"sesame").digest(): KeyRules()}
    assert await patch(house, "127.0.0.1") == 401
    assert await patch(house, "10.0.0.9", authorization="Bearer sesame") == 200


async def test_metrics_tell_of_each_camera(client: httpx.AsyncClient, house: House) -> None:
    house.vision.report = {
        "state": "streaming", "camera_fps": 25.0, "fps": 9.9, "fps_wanted": 10.0, "latency_ms": 3.5, "is_slowed": True, "failures": 0,
        "processed": 120, "connections": 2, "stalls": 1, "age_ms_p50": 12.0, "age_ms_p95": None,
        "skipped": {"not_due": 200, "busy": 3, "stale": 0},
    }  # fmt: skip
    text = (await client.get("/metrics")).text
    for line in (
        'hotspare_camera_streaming{camera="belt"} 1.0',
        'hotspare_camera_fps_in{camera="belt"} 25.0',
        'hotspare_camera_slowed{camera="belt"} 1.0',
        'hotspare_camera_dropped_total{camera="belt",cause="busy"} 3.0',
        'hotspare_camera_frame_age_ms{camera="belt",quantile="0.5"} 12.0',
        'hotspare_camera_connections_total{camera="belt"} 2.0',
        'hotspare_camera_stalls_total{camera="belt"} 1.0',
        'hotspare_camera_inference_ms{camera="belt"} 3.5',
        "hotspare_camera_events_dropped_total 0.0",
    ):
        assert f"{line}\n" in text, line
    assert 'quantile="0.95"' not in text  # not measured yet is not zero
