"""Who may give orders where no token is asked for."""

from __future__ import annotations

import pytest

from coordinator.callers import refusal

JSON = {"content-type": "application/json; charset=utf-8"}


@pytest.mark.parametrize(
    ("host", "own_host", "is_let_in"),
    [
        ("127.0.0.1:8090", "127.0.0.1", True),
        ("localhost:8090", "127.0.0.1", True),
        ("[::1]:8090", "::1", True),
        ("10.0.0.5:8090", "0.0.0.0", True),
        ("fleet.lan:8090", "fleet.lan", True),
        ("Fleet.lan", "fleet.LAN", True),
        ("evil.example:8090", "127.0.0.1", False),
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        ("localhost.evil.example", "127.0.0.1", False),
        ("evil@127.0.0.1", "127.0.0.1", True),  # no browser sends it, and it names the address all the same
        ("", "", False),
        ("[::1", "::1", False),
    ],
)
def test_a_name_that_could_be_turned_to_this_address_is_refused(host: str, own_host: str, is_let_in: bool) -> None:
    told = refusal("POST", {**JSON, "host": host}, own_host, has_token=False)
    assert (told is None) == is_let_in
    assert told is None or (told[0] == 403 and "token_file" in told[1])
    assert refusal("POST", {**JSON, "host": host}, own_host, has_token=True) is None


@pytest.mark.parametrize(
    ("origin", "is_let_in"),
    [("http://127.0.0.1:8090", True), ("http://127.0.0.1:8080", False), ("null", False), ("http://evil.example", False)],
)
def test_a_page_of_another_origin_is_refused(origin: str, is_let_in: bool) -> None:
    assert (refusal("DELETE", {"host": "127.0.0.1:8090", "origin": origin}, "127.0.0.1", False) is None) == is_let_in


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=application/json"])
def test_only_json_gives_orders(kind: str) -> None:
    for has_token in (True, False):
        told = refusal("PUT", {"content-type": kind, "host": "127.0.0.1"}, "127.0.0.1", has_token)
        assert told is not None and told[0] == 415
