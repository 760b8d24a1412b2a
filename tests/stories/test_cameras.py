"""Cameras of a running node: changed by file, HTTP and MQTT; cut off by the death of their worker; told to Home Assistant."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from agent.demo.stage import to_toml
from agent.link.broker import Broker
from agent.link.mqtt import Link
from agent.protocol import topics
from agent.protocol.messages import CameraState, Command, Desired
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import decode, encode, wire_now
from agent.worker.areas import Mask
from models.pictures import decode_picture
from tests.agent.worker.test_masks import area
from tests.stories.house import House, Node, needs_programs, until

pytestmark = [pytest.mark.anyio, needs_programs]
BELT = {"id": "belt", "source": "conveyor:?seed=3", "model": "conveyor-detr", "fps": 6.0, "labels": ["parcel", "ball"]}
GATE = {"name": "gate", "points": [[0.3, 0.0], [0.7, 0.0], [0.7, 1.0], [0.3, 1.0]]}
IMAGE = "hotspare-data/v1/spare-1/belt/image"
STRIP = ((0.4, 0.1), (0.6, 0.0), (0.55, 1.0), (0.45, 0.9))
HIDDEN = {"model": "conveyor-detr", "fps": 2.0}
SECRETS = {
    "at": "rtsp://admin:p@UUU/w#rd@127.0.0.1:9/live",
    "slash": "http://admin:UUUpa/ss@127.0.0.1:9/live",
    "query": "http://127.0.0.1:9/live?user=UUU&pwd=UUU",
    "path": "rtsp://127.0.0.1:9/user=UUUadmin_password=UUU_channel=1",
}

ENTITIES = ("image/spare-1/belt_picture", "binary_sensor/spare-1/belt_zone_gate", "binary_sensor/spare-1/belt_zone_gate_ball")


class Ear:
    """The last payload of each topic."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.said: dict[str, bytes] = {}
        self.images: list[bytes] = []  # of the belt, in order

    async def listen(self) -> None:
        async for message in self.link.messages():
            self.said[message.topic] = message.payload
            if message.topic == IMAGE:
                self.images.append(message.payload)
            self.link.acknowledge(message)

    def state(self, camera: str) -> CameraState | None:
        payload = self.said.get(f"hotspare-data/v1/spare-1/{camera}/state")
        return decode(CameraState, payload) if payload else None

    async def order(self, op: str, args: dict[str, Any]) -> dict[str, Any]:
        identifier = new_ulid()
        command = Command(id=identifier, op=op, node="spare-1", epoch=None, issued_at=wire_now(), deadline_s=20.0, issuer="test", args=args)
        await self.link.publish(topics.command("spare-1", op), encode(command), expiry_s=20)

        async def ended() -> dict[str, Any] | None:
            told = json.loads(self.said.get(topics.result("spare-1", identifier), b"{}"))
            return told if told.get("status") in ("succeeded", "rejected", "failed") else None

        result: dict[str, Any] = await until(ended, 20.0, f"{op} ended")
        return result


@asynccontextmanager
async def hearing(port: int) -> AsyncIterator[Ear]:
    async with Link(Broker("127.0.0.1", port, "ear", session_expiry_s=0)) as link, anyio.create_task_group() as tasks:
        await link.subscribe(
            ["hotspare-data/#", "homeassistant/#", f"{topics.ROOT}/+/res/+", f"{topics.ROOT}/+/evt/#", f"{topics.ROOT}/+/state"]
        )
        ear = Ear(link)
        tasks.start_soon(ear.listen)
        yield ear
        tasks.cancel_scope.cancel()


async def cameras(node: Node) -> dict[str, dict[str, Any]]:
    return {camera["id"]: camera for camera in (await node.client.get("/cameras")).json()["data"]}


async def until_streaming(node: Node, *wanted: str) -> dict[str, dict[str, Any]]:
    async def stream() -> dict[str, dict[str, Any]] | None:
        now = await cameras(node)
        return now if set(now) == set(wanted) and all(camera["state"] == "streaming" for camera in now.values()) else None

    now: dict[str, dict[str, Any]] = await until(stream, 20.0, f"{wanted} streaming")
    return now


async def test_cameras_are_changed_while_they_run(tmp_path: Path) -> None:
    house = House(tmp_path)
    mqtt = {"host": "127.0.0.1", "port": house.broker}
    settings = house.node_settings(
        "spare-1", models={"serve": []}, worker={"threads": 1}, mqtt=mqtt, home_assistant={"prefix": "homeassistant", "image_s": 1.0}
    )
    settings["cameras"] = [BELT]
    async with house.mosquitto(), hearing(house.broker) as ear, house.node(settings) as node:
        await node.until_serving("conveyor-detr")
        await until_streaming(node, "belt")
        await changed_by_file(house, node, settings)
        await changed_by_mqtt(ear, node)
        await refused(ear, node)
        await told_to_home_assistant(ear)
        await is_switched(ear, node)
        await shows_nothing_masked(ear, node)
        await hides_passwords(ear, node)
        await survives_its_worker(node)
        assert (await node.client.delete("/cameras/belt")).status_code == 200

        async def cleared() -> bool:
            return all(
                not payload for topic, payload in ear.said.items() if "/belt" in topic and topic.endswith(("/state", "/config", "/image"))
            )

        await until(cleared, 15.0, "what was retained of the camera is cleared")


async def changed_by_file(house: House, node: Node, settings: dict[str, Any]) -> None:
    file = house.folder / "spare-1.toml"
    file.write_text(to_toml({**settings, "cameras": [BELT, {**BELT, "id": "second", "source": "conveyor:?seed=9"}]}))
    now = await until_streaming(node, "belt", "second")
    assert now["belt"]["connections"] == 1  # nobody touched it
    file.write_text(to_toml(settings) + "\n[[cameras]]\nid = 'BAD NAME'\n")
    node.process.send_signal(signal.SIGHUP)

    async def complained() -> bool:
        return any("not taken" in event["message"] and "cameras" in event["message"] for event in (await node.state())["events"])

    await until(complained, 10.0, "a file that cannot be used is reported")
    far = {**GATE, "points": [[0, 0], [3, 0], [1, 1]]}
    file.write_text(
        to_toml({**settings, "cameras": [{**BELT, "fps": 3.0}, {**BELT, "id": "second", "zones": [far]}, {**BELT, "id": "third"}]})
    )

    async def named() -> bool:
        return any("camera second: zones[0].points[1][0]" in event["message"] for event in (await node.state())["events"])

    await until(named, 15.0, "the camera at fault and its field are named")
    assert set(await cameras(node)) == {"belt", "second"}
    assert (await node.client.get("/cameras/belt")).json()["settings"]["fps"] == BELT["fps"]  # nothing of it counts
    file.write_text(to_toml({**settings, "cameras": [BELT, {**BELT, "id": "second", "source": "conveyor:?seed=9"}]}))


async def changed_by_mqtt(ear: Ear, node: Node) -> None:
    result = await ear.order("camera.set", {"id": "belt", "settings": {"zones": [GATE]}})
    assert (result["status"], result["output"]) == ("succeeded", {"camera": "belt"})
    told = (await node.client.get("/cameras/belt")).json()
    assert (told["settings"]["zones"], told["connections"], told["origin"]) == ([GATE], 1, "order")
    result = await ear.order("camera.set", {"id": "belt", "settings": {"zones": [{**GATE, "points": [[0, 0], [3, 0], [1, 1]]}]}})
    assert (result["status"], result["output"]) == ("rejected", {"field": "zones[0].points[1][0]"})
    assert (await ear.order("camera.remove", {"id": "second"}))["status"] == "succeeded"
    await until_streaming(node, "belt")
    assert (await ear.order("camera.reset", {"id": "second"}))["output"] == {"camera": "second", "changed": True}
    await until_streaming(node, "belt", "second")


async def refused(ear: Ear, node: Node) -> None:
    """Whoever sends what cannot be is told the field, and all is as before."""
    answer = await node.client.patch("/cameras/belt", json={"fps": 3.0, "colour": "red"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "colour")
    told = (await node.client.get("/cameras/belt")).json()
    assert (told["settings"]["fps"], told["connections"]) == (6.0, 1)
    wrong = {**{name: BELT[name] for name in ("id", "source", "model")}, "settings": {"motion": {"speed": 3}}}
    document = Desired.model_validate({"node": "spare-1", "ts": wire_now(), "rev": 9, "pipelines": ({**wrong, "id": "gate"}, wrong)})
    await ear.link.publish(topics.desired("spare-1"), encode(document), expiry_s=20)

    async def said() -> bool:
        return any("camera gate: motion.speed" in payload.decode() for topic, payload in ear.said.items() if "/evt/" in topic)

    await until(said, 10.0, "the coordinator hears what is wrong with its document")
    assert set(await cameras(node)) == {"belt", "second"}


async def told_to_home_assistant(ear: Ear) -> None:
    async def occupied() -> bool:
        state = ear.state("belt")
        return state is not None and bool(state.zones.get("gate")) and bool(ear.said.get(IMAGE))

    await until(occupied, 20.0, "the zone holds something, and there is a picture")
    assert decode_picture(ear.said[IMAGE]).any()
    wanted = [f"homeassistant/{entity}/config" for entity in ENTITIES]

    async def announced() -> bool:
        return all(ear.said.get(topic) for topic in wanted)

    await until(announced, 10.0, "the camera, its zone and its classes are devices and entities")


async def is_switched(ear: Ear, node: Node) -> None:
    """From Home Assistant; what is retained, or for no camera, is not obeyed."""
    topic = topics.camera_switch("spare-1", "belt")
    await ear.link.publish(topics.camera_switch("spare-1", "nobody"), b"ON")
    for payload, wanted in ((b"OFF", "paused"), (b"maybe", "paused"), (b"ON", "streaming")):
        await ear.link.publish(topic, payload)

        async def is_so(wanted: str = wanted) -> bool:
            state = ear.state("belt")
            return state is not None and state.state == wanted

        await until(is_so, 20.0, f"{payload!r} makes it {wanted}")
    assert (await node.client.get("/cameras/belt")).json()["settings"]["enabled"] is True
    assert "nobody" not in await cameras(node)
    answer = await node.client.patch("/cameras/belt", json={"enabled": False})
    assert (answer.status_code, answer.json()["state"]) in ((200, "paused"), (200, "streaming"))  # the report comes once a second

    async def is_paused() -> bool:
        return bool((await cameras(node))["belt"]["state"] == "paused")

    await until(is_paused, 10.0, "paused over HTTP")
    assert (await node.client.get("/cameras/belt/snapshot.jpg")).status_code == 503
    assert (await node.client.patch("/cameras/belt", json={"enabled": None})).status_code == 200
    await until_streaming(node, "belt", "second")


async def shows_nothing_masked(ear: Ear, node: Node) -> None:
    """A mask is drawn while pictures go out: what shows it unmasked is taken away, and no picture after that does."""
    before = len(ear.images)
    assert (await node.client.patch("/cameras/belt", json={"masks": [{"name": "strip", "points": STRIP}]})).status_code == 200

    async def replaced() -> list[bytes] | None:
        since = ear.images[before:]
        fresh = [image for image in since[since.index(b"") :] if image] if b"" in since else []
        return fresh if len(fresh) >= 2 else None

    pictures = await until(replaced, 30.0, "the retained picture is taken away, and others come in its place")
    for boxes in (0, 1):
        pictures.append((await node.client.get("/cameras/belt/snapshot.jpg", params={"boxes": boxes})).content)
        pictures += await frames(node, f"/cameras/belt/stream.mjpg?boxes={boxes}", 3)
    covered = area([Mask("strip", STRIP)], 360, 640)
    for picture in map(decode_picture, pictures):
        assert picture.shape == (360, 640, 3)
        assert not picture[covered].any()
        assert picture[~covered].any()


async def frames(node: Node, path: str, count: int) -> list[bytes]:
    """The first pictures of a Motion JPEG stream."""
    data = b""
    async with node.client.stream("GET", path) as answer:
        async for chunk in answer.aiter_raw():
            data += chunk
            if data.count(b"--hotspare-frame") > count:
                break
    return [part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for part in data.split(b"--hotspare-frame\r\n")[1 : count + 1]]


async def hides_passwords(ear: Ear, node: Node) -> None:
    """UUU is in every one of them, and in no ULID; nobody hears it, and what was shown can be sent back."""
    for camera, source in SECRETS.items():
        if camera == "slash":
            assert (await ear.order("camera.set", {"id": camera, "settings": {**HIDDEN, "source": source}}))["status"] == "succeeded"
        else:
            assert (await node.client.put(f"/cameras/{camera}", json={**HIDDEN, "source": source})).status_code == 200
    blank = {**HIDDEN, "source": "rtsp://admin:UUU word@127.0.0.1:9/live"}
    answers = [await node.client.put("/cameras/blank", json=blank), await node.client.put("/cameras/blank", json={**blank, "fps": -1})]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert (await ear.order("camera.set", {"id": "blank", "settings": blank}))["output"] == {"field": "source"}
    assert (await ear.order("pipeline.start", {"id": "blank", **blank}))["status"] in ("rejected", "failed")

    async def lost() -> bool:
        now = await cameras(node)
        return all(now[camera]["state"] == "backing_off" and f"/{camera}/state" in " ".join(ear.said) for camera in SECRETS)

    await until(lost, 30.0, "the cameras that nobody can reach are said to be lost")
    shown = (await node.client.get("/cameras/at")).json()["settings"]["source"]
    assert shown == "rtsp://…@127.0.0.1:9/live"
    answers.append(await node.client.patch("/cameras/at", json={"source": shown, "fps": 3.0}))
    assert answers[-1].status_code == 200
    paths = ("/", "/node", "/metrics", "/cameras", "/events", *(f"/cameras/{camera}" for camera in SECRETS))
    answers += [await node.client.get(path) for path in paths]
    heard = [f"{topic} {payload!r}" for topic, payload in ear.said.items() if not topic.endswith("/image")]
    for text in (*(answer.text for answer in answers), *heard, node.log.read_text()):
        assert "UUU" not in text
    kept = node.log.with_name("spare-1") / "desired.json"
    assert json.loads(kept.read_bytes())["pipelines"]["at"]["source"] == SECRETS["at"]
    files = [file for file in kept.parent.glob("*") if file.name.split(".")[0] in ("desired", "journal", "cameras", "outbox")]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    for camera in SECRETS:
        assert (await node.client.delete(f"/cameras/{camera}")).status_code == 200


async def survives_its_worker(node: Node) -> None:
    """Killed in the middle of an event: the event is ended with a mark, the camera comes back, new events begin."""

    async def open_events() -> list[str]:
        page = (await node.client.get("/cameras/belt/events", params={"limit": 200})).json()
        return [event["id"] for event in page["data"] if event["state"] == "open"]

    cut = await until(open_events, 20.0, "an event that goes on")
    state = await node.state()
    (pid,) = [worker["pid"] for worker in state["workers"] if worker["name"] == "vision"]
    os.kill(pid, signal.SIGKILL)

    async def ended() -> bool:
        events = [(await node.client.get(f"/events/{identifier}")).json() for identifier in cut]
        return all(event["state"] == "ended" for event in events) and "worker_lost" in {event["ended_by"] for event in events}

    await until(ended, 10.0, "the events are ended")
    await until_streaming(node, "belt", "second")

    async def begun() -> bool:
        return bool(set(await open_events()) - set(cut))

    await until(begun, 20.0, "new events begin")
