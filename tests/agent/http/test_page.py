"""The page's files: what they refer to, and the policy they are served with."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import httpx
import pytest

from agent.http.page import FILES

pytestmark = pytest.mark.anyio


class References(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.found += [str(named[name]) for name in ("src", "href") if name in named]
        if tag == "style" or "style" in named or (tag == "script" and "src" not in named) or any(name.startswith("on") for name in named):
            self.inline.append(tag)


async def test_every_reference_is_answered_by_the_node_itself(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    references = References()
    references.feed(page.text)
    assert references.found
    assert references.inline == []
    for target in references.found:
        assert target.startswith(("/", "#")), target
        assert not target.startswith("//"), target
        if target.startswith("/"):
            assert (await client.get(target)).status_code == 200, target


async def test_files_refer_to_nothing_outside(client: httpx.AsyncClient) -> None:
    for name, kind in FILES.items():
        answer = await client.get(f"/ui/{name}")
        assert answer.headers["content-type"] == kind
        addresses = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+[^\s\"')]*", answer.text)
        assert [address for address in addresses if "www.w3.org/2000/svg" not in address] == [], name
        assert not re.search(r"@import|innerHTML|\beval\(", answer.text), name
        for module in re.findall(r'from "\./([^"]+)"', answer.text):
            assert module in FILES


async def test_the_policy_lets_only_the_nodes_own_files_run(client: httpx.AsyncClient) -> None:
    policy = (await client.get("/")).headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert "unsafe" not in policy


async def test_a_path_out_of_the_folder_is_not_found(client: httpx.AsyncClient) -> None:
    for path in ("/ui/../app.py", "/ui/%2e%2e/app.py", "/ui/nothing.js", "/ui/"):
        assert (await client.get(path)).status_code == 404
