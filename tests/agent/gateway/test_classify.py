from __future__ import annotations

import socket
import ssl
from datetime import datetime, timezone

import httpx
import pytest

from agent.gateway.classify import FACTS, Failure, failure_of_error, failure_of_status, retry_after_s

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, "unauthorised"), (403, "unauthorised"), (402, "no_balance"), (429, "rate_limited"), (408, "server_error"), (500, "server_error"),
     (503, "server_error"), (529, "server_error"), (302, "malformed")],
)  # fmt: skip
def test_statuses_that_are_the_primarys_fault(status: int, kind: str) -> None:
    failure = failure_of_status(status, {}, True, NOW)
    assert failure is not None
    assert failure.kind == kind
    assert str(status) in failure.words


@pytest.mark.parametrize("status", [200, 201, 400, 404, 409, 413, 422])
def test_statuses_that_are_the_clients_to_see(status: int) -> None:
    assert failure_of_status(status, {}, True, NOW) is None


def test_with_the_clients_own_key_its_account_is_its_own_affair() -> None:
    assert failure_of_status(401, {}, False, NOW) is None
    for status in (402, 429):
        failure = failure_of_status(status, {"retry-after": "60"}, False, NOW)
        assert failure is not None
        assert failure.weight == 0


def test_a_stated_wait_opens_at_once() -> None:
    stated = failure_of_status(429, {"retry-after": "7"}, True, NOW)
    unstated = failure_of_status(429, {}, True, NOW)
    assert stated == Failure("rate_limited", "HTTP 429", 7.0, 3.0)
    assert unstated == Failure("rate_limited", "HTTP 429", None, 1.0)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("120", 120.0), (" 5 ", 5.0), ("99999999999", 600.0), ("Mon, 23 Nov 2026 12:00:30 GMT", 30.0), ("Mon, 23 Nov 2026 11:00:00 GMT", 0.0),
     ("soon", None), ("-3", None), ("", None), (None, None), ("1e3", None), ("Mon, 23 Nov 2026 12:00:30", None)],
)  # fmt: skip
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after_s(value, NOW) == seconds


def caused(error: Exception, by: BaseException) -> Exception:
    error.__cause__ = by
    return error


def test_errors_of_the_connection() -> None:
    def kind(error: Exception, has_head: bool = False, has_token: bool = False) -> str:
        return failure_of_error(error, has_head, has_token).kind

    assert kind(caused(httpx.ConnectError("all attempts failed"), ConnectionRefusedError(111, "refused"))) == "refused"
    assert kind(caused(httpx.ConnectError("no"), socket.gaierror(-2, "Name or service not known"))) == "dns"
    assert kind(caused(httpx.ConnectError("no"), ssl.SSLCertVerificationError("self-signed"))) == "tls"
    assert kind(httpx.ConnectTimeout("")) == "connect_timeout"
    assert kind(httpx.ReadTimeout("")) == "first_byte_timeout"
    assert kind(httpx.ReadTimeout(""), has_head=True) == "first_token_timeout"
    assert kind(httpx.RemoteProtocolError("Server disconnected without sending a response.")) == "closed"
    assert kind(httpx.RemoteProtocolError("illegal status line")) == "malformed"
    assert kind(httpx.ReadError(""), has_head=True) == "closed"
    assert kind(httpx.ReadError(""), has_head=True, has_token=True) == "cut"


def test_every_class_has_words_and_none_a_weight_of_nothing() -> None:
    assert all(facts.words and facts.weight > 0 for facts in FACTS.values())
