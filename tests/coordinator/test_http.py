"""The operator's API over a real socketless ASGI transport, with a real node behind a real broker."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from agent.protocol.messages import ModelState, Presence, State
from agent.protocol.wire import wire_now
from coordinator.control import Control
from coordinator.http import build_app
from coordinator.registry import Registry
from tests.agent.link.broker import Mosquitto, running_mosquitto
from tests.coordinator.fleet import TINY, Coordinator, coordinator_settings, fleet_node, running_coordinator, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path / "broker") as started:
        yield started


@asynccontextmanager
async def api(coordinator: Coordinator, token_file: Path | None = None) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(coordinator.control, coordinator.registry, token_file)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://127.0.0.1:8090"
    ) as client:
        yield client


@asynccontextmanager
async def offline(folder: Path) -> AsyncIterator[Coordinator]:
    """A coordinator that is not running: no broker, one node on record."""
    settings = coordinator_settings(Mosquitto(folder), folder)
    registry = Registry(settings.database)
    registry.store(
        "presence",
        Presence(node="edge-a", boot="b", sess=1, state="online", reason="birth", mode="standby", epoch=4, ts=wire_now()),
    )
    async with httpx.AsyncClient() as client:
        yield Coordinator(Control(settings, registry, client), registry, settings)
    registry.close()


async def test_fleet_node_command_and_events_can_be_read(broker: Mosquitto, tmp_path: Path) -> None:
    settings = coordinator_settings(broker, tmp_path)
    async with running_coordinator(settings) as coordinator, fleet_node(broker, tmp_path / "node") as node, api(coordinator) as client:
        await until(lambda: node.mode == "active" and coordinator.statuses("activate") == ["succeeded"])
        await until(lambda: coordinator.control.views()["edge-a"].mode == "active")
        fleet = (await client.get("/fleet")).json()
        assert fleet["primary"]["is_down"] and not fleet["primary"]["last_probe"]["is_good"]
        told = fleet["nodes"][0]
        expected = {
            "node": "edge-a", "is_online": True, "is_ready": True, "is_drained": False, "mode": "active", "epoch": 1, "lease": "full",
            "models": ["tiny"], "presence": "online", "agent": "0.1", "model_states": [{"name": "tiny", "status": "serving"}],
            "urgency": 0, "troubles": [], "desired": None,
        }  # fmt: skip
        assert {name: told[name] for name in expected} == expected
        assert 0 < told["lease_left_s"] <= 3 and told["silence_s"] is not None
        past = (await client.get("/primary")).json()["past"]
        assert past[0]["failed"] == past[0]["probes"] > 0 and past[-1]["is_down"] and "ConnectError" in past[-1]["reason"]
        shown = (await client.get("/fleet/edge-a")).json()
        assert shown["meta"]["endpoint"]["port"] == 8443 and shown["state"]["mode"] == "active" and shown["presence"]["state"] == "online"

        answer = await client.post("/fleet/edge-a/commands", json={"op": "ping", "args": {"echo": "hi"}})
        assert (answer.status_code, answer.json()["is_sent"], answer.json()["epoch"]) == (202, True, None)
        await until(lambda: coordinator.statuses("ping") == ["succeeded"])
        done = (await client.get(f"/commands/{answer.json()['id']}")).json()
        assert (done["is_final"], done["result"]["output"]) == (True, {"echo": "hi"})

        events = (await client.get("/events")).json()
        assert events[0]["class"] == "sync" and events[0]["node"] == "edge-a"
        assert (await client.get("/fleet")).json()["last_event"] == events[-1]["number"]
        assert (await client.get("/events", params={"before": events[0]["number"]})).json() == []
        assert (await client.get("/events", params={"after": events[-1]["number"]})).json() == []


async def test_healthz_is_open_and_all_else_asks_for_the_token(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("s3cret\n")
    async with offline(tmp_path) as coordinator, api(coordinator, token_file) as client:
        assert (await client.get("/healthz")).json() == {"status": "alive", "broker": False, "term": 0}
        for path in ("/", "/ui/fleet.js"):  # the page holds no data and asks for the token itself
            assert (await client.get(path)).status_code == 200
        for method, path in [("GET", "/primary"), ("GET", "/fleet"), ("GET", "/fleet/edge-a"), ("GET", "/events"), ("GET", "/commands/x"),
                             ("DELETE", "/fleet/edge-a"), ("POST", "/fleet/edge-a/commands")]:  # fmt: skip
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": b"Bearer \xff"}):
                assert (await client.request(method, path, headers=headers, json={"op": "ping"})).status_code == 401  # type: ignore[arg-type]  # bytes are fine
        assert (await client.get("/fleet", headers={"Authorization": "Bearer s3cret"})).status_code == 200
    token_file.write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        build_app(coordinator.control, coordinator.registry, token_file)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("GET", "/fleet/edge-z", None, 404, "edge-z"),
        ("GET", "/commands/nothing", None, 404, "nothing"),
        ("DELETE", "/fleet/edge-z", None, 404, "edge-z"),
        ("POST", "/fleet/edge-z/commands", {"op": "ping"}, 404, "edge-z"),
        ("POST", "/fleet/edge-a/commands", {"op": "format.disk"}, 422, "unknown op"),
        ("POST", "/fleet/edge-a/commands", {"op": "activate", "args": {"lease_s": "long"}}, 422, "lease_s"),
        ("POST", "/fleet/edge-a/commands", {"op": "activate"}, 422, "lease_s"),
        ("POST", "/fleet/edge-a/commands", {"op": "ping", "args": {str(n): n for n in range(300)}}, 422, "args"),
        ("POST", "/fleet/edge-a/commands", {"op": "config.set", "args": {"values": {"x": "y" * 200_000}}}, 422, "over the limit"),
        ("POST", "/fleet/edge-a/commands", {"op": "ping", "deadline_s": -1}, 422, "deadline_s"),
        ("POST", "/fleet/edge-a/commands", {"op": "ping", "sudo": True}, 422, "sudo"),
        ("GET", "/events?after=99999999999999999999", None, 422, "after"),
        ("GET", "/events?limit=0", None, 422, "limit"),
    ],
)
async def test_what_cannot_be_done_is_said(tmp_path: Path, method: str, path: str, body: object, status: int, says: str) -> None:
    async with offline(tmp_path) as coordinator, api(coordinator) as client:
        answer = await client.request(method, path, json=body)
        assert answer.status_code == status
        assert says in str(answer.json()["detail"])
        assert coordinator.registry.open_commands() == []


async def test_without_a_broker_an_order_is_kept_and_said_to_wait(tmp_path: Path) -> None:
    async with offline(tmp_path) as coordinator, api(coordinator) as client:
        answer = await client.post("/fleet/edge-a/commands", json={"op": "drain"})
        assert answer.status_code == 202
        assert answer.json() | {"id": ""} == {"id": "", "epoch": 5, "is_sent": False}
        assert coordinator.registry.nodes()[0].is_drained


async def test_a_record_that_takes_no_writes_is_a_503_with_the_reason(tmp_path: Path) -> None:
    async with offline(tmp_path) as coordinator, api(coordinator) as client:
        coordinator.registry._database.execute("PRAGMA query_only = ON")
        answer = await client.post("/fleet/edge-a/commands", json={"op": "ping"})
        assert (answer.status_code, "readonly" in answer.json()["detail"]) == (503, True)


async def test_orders_without_a_token_come_from_no_other_site(tmp_path: Path) -> None:
    async with offline(tmp_path) as coordinator, api(coordinator) as client:
        path, body = "/fleet/edge-a/commands", b'{"op": "drain"}'
        json_kind = {"Content-Type": "application/json"}
        for headers, status in [
            ({"Content-Type": "text/plain"}, 415),  # what a form of any site can send
            ({}, 415),
            ({**json_kind, "Host": "evil.example:8090"}, 403),  # a name turned to this address
            ({**json_kind, "Origin": "http://evil.example"}, 403),
            ({**json_kind, "Origin": "null"}, 403),
        ]:
            assert (await client.post(path, content=body, headers=headers)).status_code == status, headers
        assert (await client.delete("/fleet/edge-a", headers={"Host": "evil.example"})).status_code == 403
        assert (await client.put("/fleet/edge-a/desired", content=b"{}", headers={"Content-Type": "text/plain"})).status_code == 415
        assert coordinator.registry.open_commands() == [] and coordinator.registry.node("edge-a") is not None
        assert (await client.get("/fleet", headers={"Host": "coordinator.example"})).status_code == 200
        own = {**json_kind, "Origin": "http://127.0.0.1:8090"}
        assert (await client.post(path, content=body, headers=own)).status_code == 202


async def test_five_hundred_nodes_are_one_bounded_answer(tmp_path: Path) -> None:
    async with offline(tmp_path) as coordinator, api(coordinator) as client:
        talkative = "<b>" * 600
        models = tuple(ModelState(name=f"model-{n}", status="failed", message=talkative) for n in range(40))
        for number in range(500):
            node = f"edge-{number:03d}"
            common = {"node": node, "boot": "b", "epoch": 1, "mode": "standby"}
            coordinator.registry.store("presence", Presence(sess=1, state="online", reason="birth", ts=wire_now(), **common))  # type: ignore[arg-type]
            coordinator.registry.store("state", State(seq=1, models=models if number < 10 else (TINY,), **common))  # type: ignore[arg-type]
        answer = await client.get("/fleet")
        nodes = answer.json()["nodes"]
        assert len(nodes) == 501
        assert len(answer.content) < 1_000_000
        assert max(len(json.dumps(node)) for node in nodes) < 4_000, "one node's words make the list long"
        assert next(node for node in nodes if node["node"] == "edge-000")["model_count"] == 40
