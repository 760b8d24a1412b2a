"""Orders about models over HTTP, and who may give them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import httpx
import pytest

from agent.http.collaborators import AttemptView, BuildView
from agent.http.keys import KeyRules
from tests.agent.http.conftest import House

pytestmark = pytest.mark.anyio


def asking(house: House, host: str = "127.0.0.1", **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(house.app().asgi, client=(host, 40000))
    return httpx.AsyncClient(transport=transport, base_url="http://node", headers=headers)


async def test_a_deployment_is_ordered_and_cancelled(house: House) -> None:
    async with asking(house) as client:
        body = {"model": "parrot", "precision": "fp16", "target": "auto", "calibration": "belt", "accept_unverified": False}
        answer = await client.post("/v1/deployments", json=body)
        assert (answer.status_code, answer.headers["location"]) == (202, "/v1/deployments/parrot")
        assert house.foreman.orders == [("parrot", {name: value for name, value in body.items() if name != "model"})]
        assert (await client.delete("/v1/deployments/parrot")).json()["cancelled"] is True
        assert (await client.delete("/v1/deployments/letters")).json()["cancelled"] is False


async def test_progress_and_what_was_tried_can_be_read(house: House) -> None:
    parrot, *others = house.node.now.models
    ladder = (AttemptView("fp16", "failed", "boxes are lost", "/norm (Mul), relative error 0.03"), AttemptView("fp32", "passed"))
    parrot = replace(parrot, is_current=False, build=BuildView("building", "convert", 0.25), ladder=ladder)
    house.node.now = replace(house.node.now, models=(parrot, *others))
    async with asking(house, "192.0.2.7") as client:
        entry = (await client.get("/v1/deployments/deepseek-chat")).json()
        assert (entry["id"], entry["status"], entry["is_current"]) == ("parrot", "serving", False)
        assert entry["build"] == {"status": "building", "phase": "convert", "progress": 0.25, "message": "", "attempts": 0}
        assert entry["ladder"][0]["worst"].startswith("/norm")
        assert [one["id"] for one in (await client.get("/v1/deployments")).json()["data"]][:2] == ["parrot", "letters"]
        metrics = (await client.get("/metrics")).text
        assert 'hotspare_model_build_progress{model="parrot"} 0.25' in metrics
        assert 'hotspare_model_current{model="parrot"} 0.0' in metrics


@pytest.mark.parametrize(
    ("host", "headers"),
    [("192.0.2.7", {}), ("127.0.0.1", {"X-Forwarded-For": "192.0.2.7"}), ("::1", {"Forwarded": "for=192.0.2.7"})],
)
async def test_without_keys_orders_come_from_this_machine_only(house: House, host: str, headers: dict[str, str]) -> None:
    async with asking(house, host, **headers) as client:
        for answer in (await client.post("/v1/deployments", json={"model": "parrot"}), await client.delete("/v1/deployments/parrot")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_allowed")
    assert (house.foreman.orders, house.foreman.cancelled) == ([], [])


async def test_with_keys_whoever_holds_one_may_order(house: House) -> None:
    house.keys = {hashlib.sha256(b"sesame").digest(): KeyRules()}
    async with asking(house, "192.0.2.7") as client:
        assert (await client.post("/v1/deployments", json={"model": "parrot"})).status_code == 401
        assert (await client.get("/v1/deployments")).status_code == 401
        with_key = {"Authorization": "Bearer sesame"}
        assert (await client.post("/v1/deployments", json={"model": "parrot"}, headers=with_key)).status_code == 202


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "unknown"}, 404, "model_not_found"),
        ({"model": "../etc"}, 400, "invalid_value"),
        ({"model": "parrot", "calibration": "../../etc"}, 400, "invalid_value"),
        ({"model": "parrot", "precision": "fp8"}, 400, "invalid_value"),
        ({"model": "parrot", "shell": "rm"}, 400, "unknown_parameter"),
        ({}, 400, "missing_required_parameter"),
    ],
)
async def test_what_cannot_be_ordered_is_refused(house: House, body: dict[str, object], status: int, code: str) -> None:
    async with asking(house) as client:
        answer = await client.post("/v1/deployments", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert house.foreman.orders == []


async def test_an_order_in_disguise_of_a_form_is_refused(house: House) -> None:
    async with asking(house) as client:
        answer = await client.post("/v1/deployments", content=b'{"model": "parrot"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400, "a page of another site can send this without being asked first"
    assert house.foreman.orders == []


async def test_a_deployment_that_is_not_there(house: House) -> None:
    async with asking(house) as client:
        assert (await client.get("/v1/deployments/nobody")).status_code == 404
