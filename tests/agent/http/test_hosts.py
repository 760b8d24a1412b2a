"""No page of another site sees what the cameras see or gives orders, by whatever name it calls this node."""

from __future__ import annotations

import httpx
import pytest

from agent.http.hosts import can_be_turned, is_of_another_page
from tests.agent.http.conftest import House


@pytest.mark.parametrize(
    ("host", "can_be"),
    [
        ("127.0.0.1:8080", False),
        ("[fd00::7]:8080", False),
        ("localhost", False),
        ("spare-1:8080", False),
        ("spare-1.local:8080", False),
        ("spare-1.lan.", False),
        ("jetson.home.arpa", False),
        ("Edge.Example.org:8080", False),  # its own
        ("edge.example.org.evil.example", True),
        ("127.0.0.1.evil.example", True),
        ("evil.example", True),
        ("", True),
        ("[::1", True),
    ],
)
def test_which_names_may_be_anybodys(host: str, can_be: bool) -> None:
    assert can_be_turned(host, {"edge.example.org"}) is can_be


@pytest.mark.parametrize(
    ("origin", "is_another"),
    [(None, False), ("http://edge:8080", False), ("http://edge", True), ("https://evil.example", True), ("null", True), ("http://[", True)],
)
def test_which_pages_are_anothers(origin: str | None, is_another: bool) -> None:
    assert is_of_another_page("edge:8080", origin) is is_another


@pytest.mark.anyio
async def test_without_keys_other_sites_get_answers_but_nothing_private(house: House) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(house.app().asgi), base_url="http://evil.example:8080") as client:
        for path in ("/cameras", "/events", "/node", "/v1/deployments", "/files", "/cameras/door/snapshot.jpg"):
            answer = await client.get(path)
            assert answer.status_code == 403 and "evil.example" in answer.json()["error"]["message"], path
        assert (await client.get("/cameras", headers={"Host": "10.0.0.7:8080"})).status_code == 200
        foreign = {"Host": "10.0.0.7:8080", "Origin": "http://evil.example"}
        assert (await client.post("/v1/deployments", headers=foreign, content="{}")).status_code == 403
        # A balancer hands on whatever its clients call it.
        chat = {"model": "parrot", "messages": [{"role": "user", "content": "hello"}]}
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
        assert (await client.get("/healthz")).status_code == 200
