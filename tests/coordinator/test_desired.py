"""Desired documents: every node gets its own, whoever was away, and none twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from agent.link.broker import PublishRefused
from agent.link.mqtt import Link
from agent.protocol import topics
from agent.protocol.messages import Desired, DesiredModel, DesiredPipeline, State
from agent.protocol.wire import MessageError, decode
from coordinator.orders import NotActing
from coordinator.registry import Registry
from tests.agent.link.broker import Mosquitto, running_mosquitto
from tests.coordinator.fleet import Node, coordinator_settings, fleet_node, running_coordinator, until
from tests.coordinator.test_http import api, offline
from tests.coordinator.test_recovery import birth, say, speaker

pytestmark = pytest.mark.anyio

MODELS = [DesiredModel(name="tiny")]
BELT = DesiredPipeline(id="belt", source="rtsp://eye:s3cret@10.0.0.20/stream", model="tiny", settings={"fps": 5.0})


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path / "broker") as started:
        yield started


def revisions(node: Node) -> list[int]:
    """In the order they came; one that comes again, as messages of QoS 1 and retained ones do, is no news to a node."""
    return list(dict.fromkeys(document.rev for document in node.documents))


async def test_a_node_gets_its_document_and_says_what_it_took(broker: Mosquitto, tmp_path: Path) -> None:
    settings = coordinator_settings(broker, tmp_path)
    async with (
        running_coordinator(settings) as coordinator,
        fleet_node(broker, tmp_path / "node") as node,
        fleet_node(broker, tmp_path / "node", "edge-b") as other,
        api(coordinator) as client,
    ):
        await until(lambda: len(coordinator.registry.nodes()) == 2)
        body = {"models": ["tiny"], "pipelines": [BELT.model_dump()]}
        assert (await client.put("/fleet/edge-a/desired", json=body)).json() == {"rev": 1, "is_sent": True}
        await until(lambda: node.documents, "the document came")
        assert node.documents[0] == Desired(rev=1, models=tuple(MODELS), pipelines=(BELT,))

        async def taken() -> bool:
            told = (await client.get("/fleet/edge-a/desired")).json()
            assert "s3cret" not in str(told) and told["pipelines"][0]["source"] == "rtsp://…@10.0.0.20/stream"
            return bool(told["taken_rev"] == 1)

        with anyio.fail_after(15):
            while not await taken():  # noqa: ASYNC110 — asked of another program
                await anyio.sleep(0.05)
        assert (await client.put("/fleet/edge-a/desired", json={"models": []})).json()["rev"] == 2
        await until(lambda: revisions(node) == [1, 2])
        assert node.documents[-1] == Desired(rev=2)
        assert other.documents == []
        assert (await client.get("/fleet/edge-b/desired")).status_code == 404


async def test_a_new_broker_and_a_node_flashed_anew_get_it_again(tmp_path: Path) -> None:
    settings = None
    for name in ("first", "second"):  # the second broker has no retained message of the first
        with running_mosquitto(tmp_path / name) as broker:
            settings = coordinator_settings(broker, tmp_path)
            async with running_coordinator(settings) as coordinator, fleet_node(broker, tmp_path / f"disk-{name}", boot=name) as node:
                if name == "first":
                    await until(lambda: coordinator.registry.node("edge-a"))
                    await coordinator.control.desired.want("edge-a", MODELS, [])
                await until(lambda: revisions(node) == [1], f"{name} broker")


async def test_what_is_wanted_without_a_broker_waits_for_it_and_a_restored_record_goes_on_above_the_node(tmp_path: Path) -> None:
    async with offline(tmp_path) as coordinator:
        coordinator.registry.store("state", State(node="edge-a", boot="b", seq=1, mode="standby", epoch=0, desired_rev=7))
        document, is_sent = await coordinator.control.desired.want("edge-a", MODELS, [])
        assert (document.rev, is_sent) == (8, False)
    with running_mosquitto(tmp_path / "broker") as broker:
        async with (
            running_coordinator(coordinator_settings(broker, tmp_path)),
            fleet_node(broker, tmp_path / "node", revision=7) as node,
        ):
            await until(lambda: revisions(node) == [8])


async def test_it_stays_at_the_broker_until_the_node_is_forgotten(broker: Mosquitto, tmp_path: Path) -> None:
    async with running_coordinator(coordinator_settings(broker, tmp_path)) as coordinator:
        async with speaker(broker) as (link, _):
            await say(link, topics.presence("edge-b"), birth(), retain=True)
            await until(lambda: coordinator.registry.node("edge-b"))
        await coordinator.control.desired.want("edge-b", MODELS, [])
        async with speaker(broker, listens_to=(topics.desired("edge-b"),)) as (_, heard):
            await until(lambda: heard)
            assert decode(Desired, heard[0]).models == tuple(MODELS)
        assert await coordinator.control.forget("edge-b")
        assert coordinator.registry.desired("edge-b") is None
        async with speaker(broker, listens_to=(topics.desired("edge-b"), topics.coordinator_presence())) as (_, heard):
            await until(lambda: heard)
            assert all(b"models" not in payload for payload in heard)


async def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with offline(tmp_path) as coordinator, api(coordinator) as client:
        for body, fault in (
            ({"models": ["tiny"], "cameras": []}, "cameras"),
            ({"models": ["../etc"]}, "models"),
            ({"pipelines": [{"id": "belt", "source": "conveyor:"}]}, "model"),
            ({"pipelines": [{**BELT.model_dump(), "settings": {"notes": "y" * 200_000}}]}, "over the limit"),
        ):
            answer = await client.put("/fleet/edge-a/desired", json=body)
            assert answer.status_code == 422 and fault in answer.text, answer.text
        assert (await client.put("/fleet/edge-z/desired", json={})).status_code == 404
        assert (await client.get("/fleet/edge-a/desired")).status_code == 404
        with pytest.raises(KeyError):
            await coordinator.control.desired.want("edge-z", [], [])
        with pytest.raises(MessageError):
            await coordinator.control.desired.want("edge-a", MODELS * 65, [])
        coordinator.control.orders.rival = coordinator.control._presence(online=True)
        with pytest.raises(NotActing):
            await coordinator.control.desired.want("edge-a", MODELS, [])
        assert (await client.put("/fleet/edge-a/desired", json={})).status_code == 409
        assert coordinator.registry.desired("edge-a") is None


async def test_what_the_broker_refuses_is_not_wanted_later(tmp_path: Path) -> None:
    class Refusing:
        async def publish(self, *_: Any, **__: Any) -> None:
            raise PublishRefused("not authorised")

    async with offline(tmp_path) as coordinator:
        first, _ = await coordinator.control.desired.want("edge-a", MODELS, [])
        coordinator.control.orders.link = cast("Link", Refusing())
        with pytest.raises(PublishRefused):
            await coordinator.control.desired.want("edge-a", [], [])
        assert coordinator.registry.desired("edge-a") == first


async def test_a_document_of_another_version_is_ignored(tmp_path: Path) -> None:
    async with offline(tmp_path) as coordinator:
        await coordinator.control.desired.want("edge-a", MODELS, [])
        coordinator.registry._database.execute("""UPDATE desired SET document = '{"rev": "new"}'""")
        assert coordinator.registry.desired("edge-a") is None
        await coordinator.control.desired.reissue()


def test_the_record_is_for_its_owner_alone(tmp_path: Path) -> None:
    (tmp_path / "coordinator.sqlite").touch(mode=0o644)  # of an earlier version
    with closing(Registry(tmp_path / "coordinator.sqlite")) as registry:
        registry.want("edge-a", Desired(rev=1, pipelines=(BELT,)))
        files = list(tmp_path.glob("coordinator.sqlite*"))
        assert len(files) == 3 and all(file.stat().st_mode & 0o077 == 0 for file in files), files
