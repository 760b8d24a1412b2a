"""A node that records, and a vision worker that is killed in the middle of it: nothing stays open, and no clip is half a clip."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import av
import pytest

from tests.stories.house import House, Node, until

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(300)]
RECORD = {"enabled": True, "pre_s": 1.0, "post_s": 0.5, "max_s": 30.0}
BELT = {"id": "belt", "source": "conveyor:?seed=3", "model": "conveyor-detr", "fps": 6.0, "record": RECORD}


async def events(node: Node) -> list[dict[str, Any]]:
    page: list[dict[str, Any]] = (await node.client.get("/cameras/belt/events", params={"limit": 200})).json()["data"]
    return page


def halves(folder: Path) -> list[str]:
    """Names of clips that are being written: `.{event}.{process}.part`."""
    return [file.name for file in folder.glob(".*.part")]


async def pictures_of_clip(node: Node, event: dict[str, Any]) -> int:
    answer = await node.client.get(event["clip"])
    assert answer.status_code == 200
    with av.open(io.BytesIO(answer.content)) as container:
        return sum(1 for _ in container.decode(video=0))


async def vision(node: Node) -> dict[str, Any]:
    workers: list[dict[str, Any]] = (await node.state())["workers"]
    return next(worker for worker in workers if worker["name"] == "vision")


async def test_a_vision_worker_killed_while_it_records_leaves_ended_events_and_whole_clips_or_none(tmp_path: Path) -> None:
    house = House(tmp_path)
    settings = house.node_settings("spare-1", models={"serve": []}, worker={"threads": 1}, events={"media": str(tmp_path / "media")})
    settings["cameras"] = [BELT]
    async with house.node(settings) as node:
        await node.until_serving("conveyor-detr")
        killed = [await kill_in_mid_clip(node, tmp_path / "media" / "belt") for _ in range(2)]

        async def records_again() -> bool:
            return any(event["clip"] and event["id"] not in {each for cut in killed for each in cut} for event in await events(node))

        await until(records_again, 60.0, "a new event has a clip")
        told = {event["id"]: event for event in await events(node)}
        for cut in killed:
            assert all(told[identifier]["state"] == "ended" for identifier in cut)
            assert any(told[identifier]["ended_by"] == "worker_lost" for identifier in cut)
            assert not any(told[identifier]["clip_is_coming"] for identifier in cut), "nobody writes it any more"
        for event in told.values():
            if event["clip"]:
                assert await pictures_of_clip(node, event) > 3
        worker = (await vision(node))["pid"]
        left = halves(tmp_path / "media" / "belt")
        assert all(name.endswith(f".{worker}.part") for name in left), f"a dead worker's half clip is still there: {left}"


async def kill_in_mid_clip(node: Node, folder: Path) -> list[str]:
    """The ids of the events that were open."""

    async def recording() -> list[str] | None:
        pid = (await vision(node))["pid"]
        named = {name.split(".")[1] for name in halves(folder) if name.endswith(f".{pid}.part")}
        cut = [event["id"] for event in await events(node) if event["state"] == "open"]
        return cut if named & set(cut) else None

    cut: list[str] = await until(recording, 60.0, "a clip is being written of an event that goes on")
    pid = (await vision(node))["pid"]
    os.kill(pid, signal.SIGKILL)

    async def ended() -> bool:
        return not any(event["state"] == "open" for event in await events(node) if event["id"] in cut)

    await until(ended, 20.0, "the events are ended")

    async def streams() -> bool:
        (camera,) = (await node.client.get("/cameras")).json()["data"]
        return bool((await vision(node))["pid"] not in (None, pid) and camera["state"] == "streaming")

    await until(streams, 60.0, "another worker looks at the camera")
    return cut
