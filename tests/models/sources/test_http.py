from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from models.durable import NoSpace
from models.sources.errors import NotThere, SourceError
from models.sources.http import Request, download, plain_url
from models.sources.partial import Partial, read_partial, write_partial
from tests.models.sources.file_server import FileServer, Served, file_server

BODY = np.random.default_rng(7).bytes(700_000)


def fetch(request: Request, target: Path, free_bytes: int = 1 << 40) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []

    def require_space(needed_bytes: int) -> None:
        if needed_bytes > free_bytes:
            raise NoSpace(f"{needed_bytes} needed")

    download(
        dataclasses.replace(request, backoff_s=0.001, read_timeout_s=5.0),
        target,
        require_space,
        lambda done, total: told.append((done, total)),
    )
    return told


def test_whole_file_with_progress(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY)
    told = fetch(Request(f"{server.url}/f", len(BODY)), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert told[0] == (0, len(BODY)) and told[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_truncated_answers_are_resumed_where_they_broke_off(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY, cuts=[100_000, 250_000])
    fetch(Request(f"{server.url}/f"), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert [headers.get("range") for _, headers in server.requests] == [None, "bytes=100000-", "bytes=350000-"]
    assert server.requests[1][1]["if-range"] == '"one"'


def test_file_that_changes_during_the_download_is_fetched_anew(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY, cuts=[100_000], refusals=[])
    with pytest.raises(SourceError):
        fetch(Request(f"{server.url}/f", tries=1), tmp_path / "f")
    changed = BODY[::-1]
    server.files["/f"] = Served(changed, etag='"two"')
    fetch(Request(f"{server.url}/f"), tmp_path / "f")
    assert server.requests[-1][1]["range"] == "bytes=100000-"
    assert (tmp_path / "f").read_bytes() == changed


@pytest.mark.parametrize("served", [Served(BODY, etag="", cuts=[100_000]), Served(BODY, etag='W/"weak"', cuts=[100_000])])
def test_without_a_strong_validator_it_starts_over(server: FileServer, tmp_path: Path, served: Served) -> None:
    server.files["/f"] = served
    fetch(Request(f"{server.url}/f"), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert all("range" not in headers for _, headers in server.requests)


def test_server_that_ignores_ranges_sends_the_whole_again(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY, cuts=[100_000], knows_ranges=False)
    fetch(Request(f"{server.url}/f"), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


def test_bytes_that_were_not_surely_on_the_disk_are_fetched_again(server: FileServer, tmp_path: Path) -> None:
    """After a power cut the end of a file may be zeros."""
    server.files["/f"] = Served(BODY)
    target, url = tmp_path / "f", f"{server.url}/f"
    target.write_bytes(BODY[:200_000] + bytes(800_000))
    write_partial(target, Partial(url, '"one"', 200_000, len(BODY)))
    fetch(Request(url), target)
    assert server.requests[0][1]["range"] == "bytes=200000-"
    assert target.read_bytes() == BODY


def test_complete_download_asks_nobody_again(server: FileServer, tmp_path: Path) -> None:
    """A process killed between the last byte and the adoption costs nothing."""
    server.files["/f"] = Served(BODY)
    fetch(Request(f"{server.url}/f"), tmp_path / "f")
    fetch(Request(f"{server.url}/f"), tmp_path / "f")
    assert len(server.requests) == 1


def test_garbled_state_starts_over(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY)
    target = tmp_path / "f"
    target.write_bytes(b"x" * 1000)
    (tmp_path / "f.json").write_bytes(b'{"url": "')
    fetch(Request(f"{server.url}/f"), target)
    assert target.read_bytes() == BODY


def test_partial_of_another_address_is_not_continued(server: FileServer, tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_bytes(BODY)
    write_partial(target, Partial("http://elsewhere/f", '"one"', 1000, len(BODY)))
    assert read_partial(target, f"{server.url}/f").durable_bytes == 0


def test_other_length_than_the_manifest_says_is_refused_before_a_byte_is_written(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY)
    with pytest.raises(SourceError, match=r"has 700000 bytes, but the manifest says 699999"):
        fetch(Request(f"{server.url}/f", 699_999), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_never_more_bytes_than_the_manifest_says(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY, announced=-1)
    with pytest.raises(SourceError, match="sends more than 5000 bytes"):
        fetch(Request(f"{server.url}/f", 5000), tmp_path / "f")


def test_announcing_more_than_is_sent_ends_after_the_tries(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY, announced=len(BODY) + 1, knows_ranges=False)
    with pytest.raises(SourceError, match=r"ended after 700000 of 700001 bytes; gave up after 3 tries"):
        fetch(Request(f"{server.url}/f", tries=3), tmp_path / "f")


def test_no_room_is_told_before_a_byte_is_written(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY)
    with pytest.raises(NoSpace):
        fetch(Request(f"{server.url}/f"), tmp_path / "f", free_bytes=600_000)
    assert not (tmp_path / "f").exists()


def test_resumption_needs_room_only_for_the_rest(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY, cuts=[400_000])
    with pytest.raises(SourceError):
        fetch(Request(f"{server.url}/f", tries=1), tmp_path / "f")
    fetch(Request(f"{server.url}/f"), tmp_path / "f", free_bytes=350_000)
    assert (tmp_path / "f").read_bytes() == BODY


def test_absent_file_is_asked_for_once(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(NotThere, match="answered 404"):
        fetch(Request(f"{server.url}/f"), tmp_path / "f")
    assert len(server.requests) == 1


def test_overloaded_server_is_asked_again(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY, refusals=[503, 429])
    fetch(Request(f"{server.url}/f"), tmp_path / "f")
    assert len(server.requests) == 3


def test_tries_are_capped(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY, refusals=[503] * 9)
    with pytest.raises(SourceError, match=r"answered 503 Service Unavailable; gave up after 5 tries"):
        fetch(Request(f"{server.url}/f"), tmp_path / "f")
    assert len(server.requests) == 5


def test_nobody_listens(tmp_path: Path) -> None:
    with file_server() as server:
        url = server.url
    with pytest.raises(SourceError, match=r"refused.*HOTSPARE_MIRROR"):
        fetch(Request(f"{url}/f", tries=2), tmp_path / "f")


def test_silent_server_runs_into_the_deadline(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY, stall_after=1000)
    request = Request(f"{server.url}/f", tries=1, read_timeout_s=0.2)
    with pytest.raises(SourceError, match="timed out"):
        download(request, tmp_path / "f", lambda needed: None, lambda done, total: None)
    assert read_partial(tmp_path / "f", request.url).durable_bytes == 1000


def test_refused_login_names_the_remedy_and_not_the_token(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY, refusals=[401])
    with pytest.raises(SourceError, match="HF_TOKEN") as caught:
        fetch(Request(f"{server.url}/f", headers=(("Authorization", "Bearer secret"),)), tmp_path / "f")
    assert "secret" not in str(caught.value)


def test_compressed_answer_is_refused(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Served(BODY, encoding="gzip")
    with pytest.raises(SourceError, match="gzip"):
        fetch(Request(f"{server.url}/f"), tmp_path / "f")


def test_login_stays_with_its_host(server: FileServer, tmp_path: Path) -> None:
    login = (("Authorization", "Bearer secret"),)
    with file_server() as other:
        server.files["/near"] = Served(redirect="/moved")
        server.files["/moved"] = Served(redirect=f"{other.url}/f")
        other.files["/f"] = Served(BODY)
        fetch(Request(f"{server.url}/near", headers=login), tmp_path / "f")
        assert [headers.get("authorization") for _, headers in server.requests] == ["Bearer secret", "Bearer secret"]
        assert "authorization" not in other.requests[0][1]
    assert (tmp_path / "f").read_bytes() == BODY


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    return both


def test_redirect_from_https_to_http_is_refused(
    server: FileServer, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", os.fspath(certificate))
    server.files["/f"] = Served(BODY)
    with file_server(certificate) as secure:
        secure.files["/f"] = Served(BODY)
        fetch(Request(f"{secure.url}/f"), tmp_path / "f")
        secure.files["/away"] = Served(redirect=f"{server.url}/f")
        with pytest.raises(SourceError, match="not https: refused"):
            fetch(Request(f"{secure.url}/away"), tmp_path / "away")
    assert server.requests == []


def test_unknown_certificate_is_told_at_once(certificate: Path, tmp_path: Path) -> None:
    with file_server(certificate) as secure, pytest.raises(SourceError, match="check the clock"):
        fetch(Request(f"{secure.url}/f"), tmp_path / "f")


def test_urls_in_messages_carry_no_secret() -> None:
    assert plain_url("https://user:pw@host:8443/a/b?X-Amz-Signature=abc#f") == "https://host:8443/a/b"
