"""The files of the fleet's page: what they refer to, and the policy they are served with."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from coordinator.page import FILES
from tests.agent.http.test_page import References
from tests.coordinator.test_http import api, offline

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with offline(tmp_path) as coordinator, api(coordinator) as opened:
        yield opened


async def test_every_reference_is_answered_by_the_coordinator_itself(client: httpx.AsyncClient) -> None:
    references = References()
    references.feed((await client.get("/")).text)
    assert references.found and references.inline == []
    for target in references.found:
        assert target.startswith(("/", "#")) and not target.startswith("//"), target
        if target.startswith("/"):
            assert (await client.get(target)).status_code == 200, target


async def test_files_refer_to_nothing_outside_and_write_no_markup(client: httpx.AsyncClient) -> None:
    for name, kind in FILES.items():
        answer = await client.get(f"/ui/{name}")
        assert answer.headers["content-type"] == kind
        addresses = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+[^\s\"')]*", answer.text)
        assert [address for address in addresses if "www.w3.org/2000/svg" not in address] == [], name
        assert not re.search(r"@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|localStorage", answer.text), name
        for module in re.findall(r'from "\./([^"]+)"', answer.text):
            assert module in FILES


async def test_the_policy_lets_only_the_coordinators_own_files_run(client: httpx.AsyncClient) -> None:
    headers = (await client.get("/")).headers
    rules = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
    assert rules["default-src"] == rules["frame-ancestors"] == rules["form-action"] == rules["base-uri"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == rules["img-src"] == "'self'"
    assert headers["x-content-type-options"] == "nosniff"


async def test_a_path_out_of_the_folder_is_not_found(client: httpx.AsyncClient) -> None:
    for path in ("/ui/../http.py", "/ui/%2e%2e/http.py", "/ui/app.js", "/ui/"):
        assert (await client.get(path)).status_code == 404
