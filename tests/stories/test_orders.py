"""An order survives the death of its node: one final result, and what is old stays without effect."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from agent.demo.primary import SwitchablePrimary
from agent.link.broker import Broker
from agent.link.mqtt import Link
from agent.protocol import topics
from agent.protocol.messages import Command, Result
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import FINAL_STATUSES, decode, encode, wire_now
from tests.stories.house import CHAT, House, needs_programs, until

pytestmark = [pytest.mark.anyio, needs_programs, pytest.mark.timeout(300)]


class Results:
    """Every result step that any node published, in order."""

    def __init__(self) -> None:
        self.steps: list[Result] = []

    @asynccontextmanager
    async def heard(self, port: int) -> AsyncIterator[Link]:
        async with Link(Broker("127.0.0.1", port, client_id="listener")) as link, anyio.create_task_group() as tasks:
            await link.subscribe([f"{topics.ROOT}/+/res/+"])

            async def listen() -> None:
                async for message in link.messages():
                    self.steps.append(decode(Result, message.payload))
                    link.acknowledge(message)

            tasks.start_soon(listen)
            yield link
            tasks.cancel_scope.cancel()

    def of(self, identifier: str) -> list[Result]:
        return [step for step in self.steps if step.id == identifier]

    def finals(self, identifier: str) -> list[Result]:
        return [step for step in self.of(identifier) if step.status in FINAL_STATUSES and not step.replayed]


async def test_a_killed_node_finishes_the_story_and_ignores_what_is_old(tmp_path: Path) -> None:
    house, results = House(tmp_path), Results()
    settings = house.node_settings("edge-a", mqtt={"host": "127.0.0.1", "port": house.broker, "heartbeat_standby_s": 2.0})
    async with anyio.create_task_group() as tasks:
        primary = SwitchablePrimary()
        tasks.start_soon(primary.run)
        async with house.mosquitto(), results.heard(house.broker) as link, house.control(primary.url) as coordinator:
            async with house.node(settings) as node:
                await node.until_serving(CHAT)
                await node.until_mode("standby")
                body = {"op": "model.deploy", "args": {"name": "all-minilm-l6-v2"}, "deadline_s": 120}
                sent = (await coordinator.post("/fleet/edge-a/commands", json=body)).json()

                async def executing() -> bool:
                    return any(step.status == "executing" for step in results.of(sent["id"]))

                await until(executing, 10, "the order is being carried out")
                node.process.kill()
                await node.process.wait()
                assert not results.finals(sent["id"])
                epoch = json.loads((await coordinator.get("/fleet/edge-a")).text)["epoch"]

            async with house.node(settings) as node:
                await node.until_serving(CHAT, "all-minilm-l6-v2")

                async def ended() -> list[Result]:
                    return results.finals(sent["id"])

                finals = await until(ended, 30, "a final result")
                assert [final.status for final in finals] == ["succeeded"]

                old = await ordered(link, results, epoch=epoch)
                assert (old.status, old.error.code if old.error else "") == ("rejected", "stale_epoch")
                again = await ordered(link, results, identifier=sent["id"], op="model.deploy", args=body["args"])
                assert again.replayed, "the same order again has no effect; its result is told once more"
                assert len(results.finals(sent["id"])) == 1
        tasks.cancel_scope.cancel()


async def ordered(
    link: Link,
    results: Results,
    *,
    op: str = "activate",
    identifier: str | None = None,
    epoch: int | None = None,
    args: Any = None,
) -> Result:
    """Publish a command as an attacker or a late broker would; its last result."""
    identifier = identifier or new_ulid()
    seen = len(results.of(identifier))
    command = Command(
        id=identifier,
        op=op,
        node="edge-a",
        epoch=epoch,
        issued_at=wire_now(),
        deadline_s=30,
        issuer="late",
        args=args or {"lease_s": 90},
    )
    await link.publish(topics.command("edge-a", op), encode(command), expiry_s=30)

    async def answered() -> list[Result]:
        return [step for step in results.of(identifier)[seen:] if step.status in FINAL_STATUSES]

    answers: list[Result] = await until(answered, 10, f"an answer to {op}")
    return answers[0]


async def test_cameras_start_and_stop_by_order(tmp_path: Path) -> None:
    house = House(tmp_path)
    settings = house.node_settings("edge-a", mqtt={"host": "127.0.0.1", "port": house.broker}, models={"serve": []})
    async with anyio.create_task_group() as tasks:
        primary = SwitchablePrimary()
        tasks.start_soon(primary.run)
        async with house.mosquitto(), house.control(primary.url) as coordinator, house.node(settings) as node:
            await node.until_mode("standby")

            async def send(op: str, **args: Any) -> dict[str, Any]:
                body = {"op": op, "args": args, "deadline_s": 60}

                async def taken() -> dict[str, Any] | None:
                    answer = await coordinator.post("/fleet/edge-a/commands", json=body)
                    sent: dict[str, Any] = answer.json()
                    return sent if answer.status_code == 202 else None  # it may not have heard of the node yet

                identifier = (await until(taken, 20, f"{op} is taken"))["id"]

                async def final() -> dict[str, Any] | None:
                    command: dict[str, Any] = (await coordinator.get(f"/commands/{identifier}")).json()
                    return command if command["is_final"] else None

                ended: dict[str, Any] = await until(final, 60, f"{op} has ended")
                return ended

            started = await send("pipeline.start", id="belt", source="conveyor:?seed=3", model="conveyor-detr", settings={"fps": 10.0})
            assert started["status"] == "succeeded", started

            async def sees() -> Any:
                pipelines = (await node.state())["pipelines"]
                return [one for one in pipelines if one["status"] == "streaming" and one["fps"] > 5]

            await until(sees, 20, "the camera streams")
            async with Link(Broker("127.0.0.1", house.broker, client_id="listener")) as link:
                await link.subscribe([topics.data("edge-a", "belt")])
                with anyio.fail_after(30):
                    async for message in link.messages():
                        seen = json.loads(message.payload)
                        if seen["kind"] == "object" and seen["type"] == "new":
                            break
            assert seen["label"] in ("parcel", "bottle", "ball"), seen
            picture = await node.client.get("/cameras/belt/snapshot.jpg")
            assert picture.content[:3] == b"\xff\xd8\xff"
            refused = await send("pipeline.start", id="bad", source="rtsp://", model="conveyor-detr")
            assert refused["status"] == "rejected"
            assert (await send("model.remove", name="conveyor-detr"))["result"]["error"]["code"] == "busy"
            assert (await send("pipeline.stop", id="belt"))["status"] == "succeeded"
            assert (await node.state())["pipelines"] == []
        tasks.cancel_scope.cancel()
